"""Requests in natural language with the tool call that answers them, made from a seed.

Every argument comes from a closed vocabulary, so that a model of ten million parameters can learn to copy it.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Argument: TypeAlias = str | int

CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Dublin", "Prague", "Athens",
    "Lisbon", "Warsaw", "Zurich", "Hamburg", "Milan", "Tokyo", "Boston", "Chicago", "Cairo", "Sydney",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Laura", "Max")
ROOMS = ("kitchen", "bedroom", "bathroom", "office", "garage", "hall", "cellar", "attic")
GENRES = ("jazz", "rock", "pop", "blues", "techno", "folk", "soul", "opera")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch", "Polish", "Greek", "Danish")
WORDS = (
    "house",
    "tree",
    "water",
    "bread",
    "friend",
    "street",
    "window",
    "garden",
    "winter",
    "music",
    "letter",
    "school",
)
CURRENCIES = ("euros", "dollars", "pounds", "yen", "francs", "crowns")
ITEMS = ("milk", "rice", "coffee", "tea", "sugar", "butter", "cheese", "pasta", "salt", "honey", "juice", "flour")
TOPICS = ("the meeting", "the budget", "the party", "the report", "the trip", "the dinner", "the exam", "the contract")
HOURS = tuple(range(6, 23))
SMALL = tuple(range(2, 10))


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a request may list.

    Attributes:
        name: Name of the function.
        arguments: Values that each argument may take, by its name, in the order of the schema.
        wordings: What a user may say; ``{argument}`` stands for the value.
    """

    name: str
    arguments: Mapping[str, tuple[Argument, ...]]
    wordings: tuple[str, ...]

    def schema(self) -> dict[str, object]:
        """Gives the function in the form of OpenAI's ``tools``."""
        properties = {
            name: {"type": "integer" if isinstance(values[0], int) else "string"}
            for name, values in self.arguments.items()
        }
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": self.name, "parameters": parameters}}


TOOLS = (
    Tool(
        "get_weather",
        {"city": CITIES, "day": DAYS},
        ("What will the weather be in {city} on {day}?", "Is it going to rain on {day} in {city}?"),
    ),
    Tool(
        "book_table",
        {"city": CITIES, "day": DAYS, "guests": SMALL},
        ("Book a table in {city} on {day} for {guests} people.", "We are {guests} and want to eat in {city} on {day}."),
    ),
    Tool(
        "set_alarm",
        {"day": DAYS, "hour": HOURS},
        ("Wake me up on {day} at {hour} o'clock.", "Set an alarm at {hour} o'clock on {day}."),
    ),
    Tool(
        "send_message",
        {"person": PEOPLE, "topic": TOPICS},
        ("Send {person} a message about {topic}.", "Write to {person} about {topic}, please."),
    ),
    Tool(
        "convert_money",
        {"amount": tuple(range(2, 100)), "source": CURRENCIES, "target": CURRENCIES},
        ("Convert {amount} {source} to {target}.", "How many {target} do I get for {amount} {source}?"),
    ),
    Tool(
        "book_train",
        {"origin": CITIES, "destination": CITIES, "day": DAYS},
        (
            "I need a train from {origin} to {destination} on {day}.",
            "Book the train to {destination} from {origin} on {day}.",
        ),
    ),
    Tool(
        "play_music",
        {"genre": GENRES, "room": ROOMS},
        ("Play some {genre} in the {room}.", "I want to hear {genre} music in the {room}."),
    ),
    Tool(
        "set_heating",
        {"room": ROOMS, "degrees": tuple(range(15, 27))},
        ("Set the heating in the {room} to {degrees} degrees.", "Make the {room} {degrees} degrees warm."),
    ),
    Tool(
        "translate",
        {"word": WORDS, "language": LANGUAGES},
        ("How do you say {word} in {language}?", "Translate the word {word} into {language}."),
    ),
    Tool(
        "order_item",
        {"item": ITEMS, "quantity": tuple(range(2, 31))},
        ("Order {quantity} packs of {item}.", "We are out of {item}, get {quantity} packs."),
    ),
    Tool(
        "plan_meeting",
        {"person": PEOPLE, "day": DAYS, "hour": HOURS},
        (
            "Plan a meeting with {person} on {day} at {hour} o'clock.",
            "I want to meet {person} at {hour} o'clock on {day}.",
        ),
    ),
    Tool(
        "find_hotel",
        {"city": CITIES, "nights": SMALL, "stars": (2, 3, 4, 5)},
        (
            "Find a hotel with {stars} stars in {city} for {nights} nights.",
            "I stay {nights} nights in {city} and want {stars} stars.",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Call:
    """One request with the call that answers it.

    Attributes:
        key: Function and arguments; two requests of one key are in the same split.
        question: The user's words.
        tools: Schemas of the two to four functions listed.
        name: Name of the function to call.
        arguments: Arguments of the call, in the order of the schema.
    """

    key: str
    question: str
    tools: tuple[dict[str, object], ...]
    name: str
    arguments: dict[str, Argument]


def make_call(random_state: random.Random) -> Call:
    """Draws one request; no value stands twice among the arguments of one vocabulary."""
    listed = random_state.sample(TOOLS, random_state.randint(2, 4))
    tool = random_state.choice(listed)
    while True:
        arguments = {name: random_state.choice(values) for name, values in tool.arguments.items()}
        words = [value for value in arguments.values() if isinstance(value, str)]
        if len(set(words)) == len(words):
            break
    question = random_state.choice(tool.wordings).format(**arguments)
    key = f"{tool.name}{sorted(arguments.items())}"
    schemas = tuple(each.schema() for each in listed)
    return Call(key=key, question=question, tools=schemas, name=tool.name, arguments=arguments)
