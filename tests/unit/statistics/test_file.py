"""The statistics file: what is written is read, and what is unsound is refused in one line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from token_rows import random_tokens, statistics_of

from reap_serve.errors import InputFileError, OutputExistsError, RequestError, StorageError
from reap_serve.statistics.file import encode, read_statistics, write_statistics
from reap_serve.statistics.merge import join_batches
from reap_serve.statistics.record import BATCH_FIELDS, ExpertSums, Statistics
from reap_serve.statistics.storage import open_source


def sample(num_experts: int = 6, num_tokens: int = 40, *, optional: bool = False) -> Statistics:
    tokens = random_tokens(np.random.default_rng(0), num_tokens, 3, num_experts, 2, num_slices=2)
    return statistics_of(tokens, num_experts, ("chat", "code"), optional=optional)


def assert_same(left: Statistics, right: Statistics) -> None:
    assert left.header == right.header
    assert set(left.fields_by_name()) == set(right.fields_by_name())
    for name, values in left.fields_by_name().items():
        found = right.fields_by_name()[name]
        assert found.dtype == values.dtype, name
        assert np.array_equal(found, values), name
    assert (left.batches is None) == (right.batches is None)
    for name in BATCH_FIELDS:
        assert np.array_equal(getattr(left.batch_sums(), name), getattr(right.batch_sums(), name)), name


@pytest.mark.parametrize("optional", [False, True])
def test_round_trip_is_exact(tmp_path: Path, optional: bool) -> None:
    written = sample(optional=optional)
    write_statistics(written, str(tmp_path / "a"), overwrite=False)
    assert_same(read_statistics(str(tmp_path / "a")), written)


def test_round_trip_of_batches(tmp_path: Path) -> None:
    tokens = random_tokens(np.random.default_rng(1), 60, 2, 4, 2)
    parts = [statistics_of(tokens[start : start + 20], 4) for start in (0, 20, 40)]
    joined = join_batches(parts)
    write_statistics(joined, str(tmp_path / "a"), overwrite=False)
    assert_same(read_statistics(str(tmp_path / "a")), joined)


def test_round_trip_through_fsspec() -> None:
    written = sample()
    write_statistics(written, "memory://folder/a.safetensors", overwrite=True)
    assert_same(read_statistics("memory://folder/a.safetensors"), written)
    with pytest.raises(OutputExistsError):
        write_statistics(written, "memory://folder/a.safetensors", overwrite=False)
    with pytest.raises(InputFileError, match="does not exist"):
        read_statistics("memory://folder/b.safetensors")


def test_other_fsspec_file_systems_get_the_file_by_renaming(tmp_path: Path) -> None:
    write_statistics(sample(), f"file://{tmp_path}/folder/a.safetensors", overwrite=False)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.safetensors"]
    assert_same(read_statistics(f"file://{tmp_path}/folder/a.safetensors"), sample())


def test_unknown_url_scheme_is_one_line() -> None:
    with pytest.raises(InputFileError, match="cannot be read"):
        read_statistics("nosuchscheme://a")
    with pytest.raises(StorageError, match="cannot be written"):
        write_statistics(sample(), "nosuchscheme://a", overwrite=True)


def test_file_is_plain_safetensors_with_narrow_dtypes(tmp_path: Path) -> None:
    statistics = sample()
    write_statistics(statistics, str(tmp_path / "a"), overwrite=False)
    tensors = load_file(tmp_path / "a")
    assert len(tensors) == 2 * 2 * 9
    counts = tensors["code/decode/token_count"]
    assert counts.dtype == np.uint16
    assert np.array_equal(counts, statistics.sums.token_count_SPLE[1, 1])
    assert tensors["chat/prefill/weighted_norm_sum"].dtype == np.float64
    assert tensors["chat/prefill/layer_token_count"].shape == (3,)


def test_large_counts_and_float32_maxima_keep_their_values(tmp_path: Path) -> None:
    sums = ExpertSums.zeros(1, 1, 3)
    sums.token_count_SPLE[0, 0, 0] = 1, 2**20, 2**40
    sums.norm_max_SPLE[0, 0, 0] = 0.5, 1.25, 3.0
    statistics = Statistics(
        statistics_of(random_tokens(np.random.default_rng(0), 1, 1, 3, 2), 3).header,
        sums,
        np.full((1, 2, 1), 2**40, np.int64),
    )
    write_statistics(statistics, str(tmp_path / "a"), overwrite=False)
    assert load_file(tmp_path / "a")["default/prefill/norm_max"].dtype == np.float32
    assert_same(read_statistics(str(tmp_path / "a")), statistics)


def test_parts_without_tokens_are_left_out(tmp_path: Path) -> None:
    tokens = random_tokens(np.random.default_rng(0), 20, 2, 4, 2)
    tokens.phase_T[:] = 0
    statistics = statistics_of(tokens, 4, ("seen", "unseen"))
    write_statistics(statistics, str(tmp_path / "a"), overwrite=False)
    assert {name.rpartition("/")[0] for name in load_file(tmp_path / "a")} == {"seen/prefill"}
    found = read_statistics(str(tmp_path / "a"))
    assert found.header.slices == ("seen",)
    assert np.array_equal(found.sums.gate_sum_SPLE[0], statistics.sums.gate_sum_SPLE[0])


def test_nothing_observed_is_not_written(tmp_path: Path) -> None:
    empty = statistics_of(random_tokens(np.random.default_rng(0), 0, 2, 4, 2), 4)
    with pytest.raises(RequestError, match="no token"):
        write_statistics(empty, str(tmp_path / "a"), overwrite=False)
    assert not list(tmp_path.iterdir())


def test_existing_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputExistsError):
        write_statistics(sample(), str(tmp_path / "a"), overwrite=False)
    assert (tmp_path / "a").read_text() == "mine"


def test_missing_file_directory_and_foreign_files(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(4)}, tmp_path / "foreign")
    (tmp_path / "text").write_text("these are no statistics, but a text that is long enough")
    (tmp_path / "empty").touch()
    for name, message in [
        ("missing", "does not exist"),
        (".", "cannot be read"),
        ("foreign", "no statistics file"),
        ("text", "corrupt"),
        ("empty", "corrupt"),
    ]:
        with pytest.raises(InputFileError, match=message) as caught:
            read_statistics(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def with_metadata(content: bytes, **changes: str) -> bytes:
    """The file with other metadata, its tensors untouched."""
    end = header_end(content)
    entries = json.loads(content[8:end])
    entries["__metadata__"] |= changes
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


def test_future_version_names_both_versions(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(with_metadata(encode(sample()), schema_version="7", header='{"new": "form"}'))
    with pytest.raises(InputFileError, match="schema version 7, this release reads version 1"):
        read_statistics(str(tmp_path / "a"))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = encode(sample())
    for length in [*range(0, len(content), 97), len(content) - 1]:
        (tmp_path / "a").write_bytes(content[:length])
        with pytest.raises(InputFileError):
            read_statistics(str(tmp_path / "a"))
    (tmp_path / "a").write_bytes(content + b"\0")
    with pytest.raises(InputFileError, match="bytes where its header needs"):
        read_statistics(str(tmp_path / "a"))


def test_every_flipped_byte_of_the_tensors_is_found(tmp_path: Path) -> None:
    content = encode(sample())
    for position in range(header_end(content), len(content), 13):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "a").write_bytes(damaged)
        with pytest.raises(InputFileError, match="corrupt"):
            read_statistics(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gate_sum_SPLE", np.nan, "not finite"),
        ("norm_max_SPLE", np.inf, "not finite"),
        ("token_count_SPLE", -1, "nega"),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, field: str, value: float, message: str) -> None:
    statistics = sample()
    getattr(statistics.sums, field)[0, 0, 0, 0] = value
    if field == "token_count_SPLE":
        statistics.sums.token_count_SPLE[0, 0, 0, 1] = 2**40
    write_statistics(statistics, str(tmp_path / "a"), overwrite=False)
    with pytest.raises(InputFileError, match=message):
        read_statistics(str(tmp_path / "a"))


def test_no_claim_of_a_header_is_believed(tmp_path: Path) -> None:
    content = encode(sample())
    inner = json.loads(json.loads(content[8 : header_end(content)])["__metadata__"]["header"])
    claims = [
        {"model": inner["model"] | {"num_experts": 10**12}},
        {"model": inner["model"] | {"num_experts": 0}},
        {"slices": ["chat", "code", "ghost"]},
        {"slices": ["chat", "chat"]},
        {"slices": ["chat", "co\nde"]},
        {"slices": []},
        {"layers": inner["layers"] * 2},
        {"layers": inner["layers"][:2]},
        {"windows": []},
        {"windows": [inner["windows"][0] | {"sample_fraction": 2.0}]},
        {"unknown": 1},
    ]
    for claim in claims:
        (tmp_path / "a").write_bytes(with_metadata(content, header=json.dumps(inner | claim)))
        with pytest.raises(InputFileError, match="corrupt"):
            read_statistics(str(tmp_path / "a"))


# Of a usual proportion of header to tensors: Python's objects for a header take several times its bytes.
FUZZED = encode(sample(num_experts=512, num_tokens=200))
FUZZED_END = header_end(FUZZED)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(2**63) | st.just("\ud800"),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_headers(draw: st.DrawFn) -> bytes:
    """Length and header of a file, damaged: bytes changed, removed or added, JSON values exchanged, length forged."""
    header = bytearray(FUZZED[8:FUZZED_END])
    kind = draw(st.sampled_from(["bytes", "entry", "metadata", "inner", "length", "noise"]))
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 8))):
            position = draw(st.integers(0, len(header) - 1))
            header[position : position + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    elif kind == "noise":
        header = bytearray(draw(st.binary(max_size=200)))
    elif kind != "length":
        entries = json.loads(header)
        place = entries
        if kind == "metadata":
            place = entries["__metadata__"]
        elif kind == "inner":
            place = json.loads(entries["__metadata__"]["header"])
        key = draw(st.sampled_from(sorted(place)))
        if kind == "entry" and isinstance(place[key], dict) and draw(st.booleans()):
            place[key][draw(st.sampled_from(sorted(place[key])))] = draw(
                JSON_VALUES | st.lists(st.integers(), max_size=4)
            )
        else:
            place[key] = draw(JSON_VALUES)
        if kind == "inner":
            entries["__metadata__"]["header"] = json.dumps(place)
        header = bytearray(json.dumps(entries).encode())
    length = draw(st.integers(0, 2**64 - 1)) if kind == "length" else len(header)
    return length.to_bytes(8, "little") + bytes(header)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=damaged_headers())
def test_fuzzed_headers_give_one_line_and_allocate_no_more_than_the_file(tmp_path: Path, header: bytes) -> None:
    path, content = tmp_path / "fuzzed", header + FUZZED[FUZZED_END:]
    path.write_bytes(content)
    message = ""
    tracemalloc.start()
    try:
        read_statistics(str(path))
    except InputFileError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    message.encode()
    assert "\n" not in message
    # A file that is sound after all, such as one made at another time, takes what its sums decode to.
    # A refused one takes no more than its size, but for the interpreter's objects of the parsed header.
    assert peak <= (len(content) + 2**16 if message else 4 * len(content))


def test_what_a_reader_raises_is_no_failure_of_reading(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    with pytest.raises(ValueError, match="of ours"), open_source(str(tmp_path / "a")):
        raise ValueError("a fault of ours")
    with pytest.raises(InputFileError, match="cannot be read"), open_source(str(tmp_path / "a")):
        raise OSError("the disk")
