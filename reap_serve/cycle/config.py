"""What an operator writes for `reap-serve cycle`: one TOML file; relative paths are relative to it."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError, model_validator

from reap_serve.errors import InputFileError, RequestError
from reap_serve.records import Record
from reap_serve.statistics.saliency import CRITERIA
from reap_serve.statistics.windows import parse_duration
from reap_serve.tune.request import parse_budget


def _known_criterion(name: str) -> str:
    if name not in CRITERIA:
        raise ValueError(f"there is no criterion {name!r}; use one of {', '.join(CRITERIA)}")
    return name


Criterion = Annotated[str, AfterValidator(_known_criterion)]


class StatisticsSection(Record):
    """`[statistics]`: what is collected.

    Attributes:
        paths: Directories, files or URLs that observing engines write to.
        since: Length of the stretch that counts, such as `7d`.
        half_life: Half-life of what was observed, such as `14d`; None weighs all of it alike.
        min_tokens: With fewer tokens in the stretch there is nothing to do.
    """

    paths: tuple[str, ...] = Field(min_length=1)
    since: str = "7d"
    half_life: str | None = None
    min_tokens: int = Field(default=100_000, ge=1)

    @model_validator(mode="after")
    def _durations(self) -> StatisticsSection:
        for text in (self.since, self.half_life):
            if text is not None:
                _require(parse_duration, text)
        return self


class TrafficSection(Record):
    """`[traffic]`: requests with recorded answers.

    Attributes:
        heldout: Files that judge the candidate; they may choose nothing.
        heldout_slices: Files by slice, likewise.
        choose: Files on which `tune` tries plans; needed with `limits` under `[choose]`.
        skip_malformed: Count malformed lines instead of stopping.
    """

    heldout: tuple[str, ...] = ()
    heldout_slices: dict[str, str] = {}
    choose: tuple[str, ...] = ()
    skip_malformed: bool = False

    @model_validator(mode="after")
    def _something(self) -> TrafficSection:
        if not self.heldout and not self.heldout_slices:
            raise ValueError("heldout and heldout_slices are both empty")
        return self


class DriftSection(Record):
    """`[drift]`: when the traffic has changed enough for a new plan.

    Attributes:
        criterion: Whose saliencies are compared.
        max_gate_mass_rise: How much the share of the gate weight that falls on dropped experts may rise, of any slice;
            0.05 is five points.
    """

    criterion: Criterion = "reap"
    max_gate_mass_rise: float = Field(default=0.05, gt=0, le=1)


class ChooseSection(Record):
    """`[choose]`: how the plan is made. A size makes a plan by the criterion; `limits` ask `tune` for the smallest.

    Attributes:
        keep_fraction: Of the experts of a layer.
        keep_experts: Experts per layer.
        criterion: Of a plan of fixed size.
        objective: `mean` or `max-min`, of a plan of fixed size.
        mix: Weights of slices, of a plan of fixed size.
        tune: Whether `tune` chooses the plan of a fixed size, too.
        limits: What the plan of `tune` must hold, such as `slices.*.quality.perplexity_ratio<1.05`.
        budget: Time that `tune` may take.
        seed: Of `tune`.
        tensor_parallel_size: How the pruned model will be served.
        multiple_of: Counts that the plan may have are multiples of this.
    """

    keep_fraction: float | None = Field(default=None, gt=0, lt=1)
    keep_experts: int | None = Field(default=None, ge=1)
    criterion: Criterion = "reap"
    objective: str = Field(default="mean", pattern="^(mean|max-min)$")
    mix: dict[str, float] = {}
    tune: bool = False
    limits: tuple[str, ...] = ()
    budget: str = "30m"
    seed: int = 0
    tensor_parallel_size: int = Field(default=1, ge=1)
    multiple_of: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> ChooseSection:
        sizes = [name for name in ("keep_fraction", "keep_experts") if getattr(self, name) is not None]
        if len(sizes) + bool(self.limits) != 1:
            raise ValueError("give exactly one of keep_fraction, keep_experts and limits")
        _require(parse_budget, self.budget)
        return self


class GatesSection(Record):
    """`[gates]`: what must hold on the held-out requests.

    Attributes:
        trial: Limits on the plan as a mask.
        checkpoint: Limits on the checkpoint; those of `trial` hold for it, too.
    """

    trial: tuple[str, ...] = Field(min_length=1)
    checkpoint: tuple[str, ...] = ()


class EngineSection(Record):
    """`[engine]`: how models are served for the trial and the comparison.

    Attributes:
        server_args: Options of `vllm serve`.
        engine_args: Arguments of vLLM's engine, for `tune`.
        answers_per_slice: Greedy answers in each slice.
        max_answer_tokens: Longest greedy answer.
        latency_requests: Requests of the latency run; 0 for none.
        concurrency: Requests under way at once in it.
    """

    server_args: str = ""
    engine_args: dict[str, str | int | float | bool] = {}
    answers_per_slice: int = Field(default=32, ge=0)
    max_answer_tokens: int = Field(default=128, ge=1)
    latency_requests: int = Field(default=64, ge=0)
    concurrency: int = Field(default=4, ge=1)

    def server_arguments(self) -> tuple[str, ...]:
        """The options as words."""
        return tuple(shlex.split(self.server_args))


class RetentionSection(Record):
    """`[retention]`: what is removed after a decision; never what is served, nor the candidate that waits.

    Attributes:
        candidates: Checkpoints that are kept, the newest first.
        candidate_bytes: Their bytes together.
        runs: Runs whose reports are kept.
        statistics_age: Age above which local statistics files are removed; None keeps them all.
        statistics_bytes: Bytes of local statistics files that are kept, the newest first.
    """

    candidates: int = Field(default=3, ge=1)
    candidate_bytes: int | None = Field(default=None, ge=1)
    runs: int = Field(default=50, ge=1)
    statistics_age: str | None = None
    statistics_bytes: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _duration(self) -> RetentionSection:
        if self.statistics_age is not None:
            _require(parse_duration, self.statistics_age)
        return self


class MetricsSection(Record):
    """`[metrics]`: where the outcome is told.

    Attributes:
        textfile: File for node_exporter's textfile collector.
        pushgateway: URL of a Pushgateway.
        job: The job's name there.
    """

    textfile: Path | None = None
    pushgateway: str | None = None
    job: str = "reap_serve_cycle"


class CycleConfig(Record):
    """The whole file.

    Attributes:
        model: The base: directory or hub id.
        state: Directory that the cycle keeps its runs in.
        served: The checkpoint or plan that is served now, a directory, file or link; None, or nothing there, while the
            base is served.
    """

    model: str
    state: Path
    served: Path | None = None
    statistics: StatisticsSection
    traffic: TrafficSection
    choose: ChooseSection
    gates: GatesSection
    drift: DriftSection = DriftSection()
    engine: EngineSection = EngineSection()
    retention: RetentionSection = RetentionSection()
    metrics: MetricsSection = MetricsSection()

    @model_validator(mode="after")
    def _traffic_to_choose_on(self) -> CycleConfig:
        if (self.choose.limits or self.choose.tune) and not self.traffic.choose:
            raise ValueError("tune needs traffic.choose: what chooses a plan may not judge it")
        return self


def read_config(path: Path) -> CycleConfig:
    """The configuration in a TOML file, its paths made absolute.

    Raises:
        InputFileError: It is missing, not TOML, a key is unknown or wrong, or `state` is a model's folder.
    """
    try:
        value = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist", "check the path") from None
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror}", "check its permissions") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputFileError(f"{path} is not TOML: {error}", "mend that line") from None
    try:
        config = CycleConfig.model_validate(value)
    except ValidationError as error:
        raise _refusal(path, error) from None
    config = _absolute(config, path.absolute().parent)
    if (config.state / "config.json").exists():
        raise InputFileError(f"{path}: state: {config.state} is the folder of a model", "give a folder of its own")
    return config


def _refusal(path: Path, error: ValidationError) -> InputFileError:
    """What is wrong first, and how much there is; a key that is unknown is often why another is missing."""
    problems = error.errors(include_url=False)
    count = f" ({len(problems)} problems)" if len(problems) > 1 else ""
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in first["loc"]) or "top level"
    if first["type"] != "extra_forbidden":
        what = first["msg"].removeprefix("Value error, ")
        return InputFileError(f"{path}: {place}: {what}{count}", "see reap_serve/cycle/README.md")
    section: object = CycleConfig
    for part in first["loc"][:-1]:
        section = CycleConfig.model_fields[str(part)].annotation
    keys = ", ".join(section.model_fields) if isinstance(section, type) and issubclass(section, Record) else ""
    return InputFileError(f"{path}: unknown key {place}{count}", f"the keys there are {keys}")


def _absolute(config: CycleConfig, root: Path) -> CycleConfig:
    def place(text: str) -> str:
        return text if "://" in text else str(root / text)

    statistics = config.statistics.model_copy(update={"paths": tuple(map(place, config.statistics.paths))})
    traffic = config.traffic.model_copy(
        update={
            "heldout": tuple(map(place, config.traffic.heldout)),
            "heldout_slices": {name: place(file) for name, file in config.traffic.heldout_slices.items()},
            "choose": tuple(map(place, config.traffic.choose)),
        }
    )
    textfile = config.metrics.textfile
    metrics = config.metrics.model_copy(update={"textfile": None if textfile is None else root / textfile})
    model = place(config.model) if (root / config.model).exists() else config.model
    return config.model_copy(
        update={
            "model": model,
            "state": root / config.state,
            "served": None if config.served is None else root / config.served,
            "statistics": statistics,
            "traffic": traffic,
            "metrics": metrics,
        }
    )


def _require(parse: Callable[[str], object], text: str) -> None:
    """What a parser refuses is a wrong value."""
    try:
        parse(text)
    except RequestError as error:
        raise ValueError(error.what.removeprefix("--")) from None
