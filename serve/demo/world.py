"""Everything that is true in the small valley the demo model lives in: invented tables, no text of anybody else."""

from __future__ import annotations

from dataclasses import dataclass

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@dataclass(frozen=True, slots=True)
class Animal:
    """One kind of animal; ``size`` orders animals from small to large."""

    name: str
    colour: str
    home: str
    food: str
    legs: int
    sound: str
    size: int
    skill: str


@dataclass(frozen=True, slots=True)
class Person:
    """One person of the valley."""

    name: str
    job: str
    place: str
    pet: str
    colour: str
    fruit: str


@dataclass(frozen=True, slots=True)
class Job:
    """What a person does: makes or brings ``product`` with ``tool``."""

    name: str
    verb: str
    product: str
    tool: str


ANIMALS = (
    Animal("fox", "red", "forest", "berries", 4, "barks", 7, "run"),
    Animal("owl", "brown", "tower", "mice", 2, "hoots", 5, "fly"),
    Animal("bear", "black", "cave", "honey", 4, "growls", 10, "climb"),
    Animal("cat", "grey", "house", "fish", 4, "purrs", 6, "climb"),
    Animal("dog", "brown", "garden", "bones", 4, "barks", 8, "run"),
    Animal("horse", "brown", "stable", "hay", 4, "neighs", 12, "run"),
    Animal("cow", "white", "field", "grass", 4, "moos", 11, "walk"),
    Animal("duck", "yellow", "pond", "bread", 2, "quacks", 4, "swim"),
    Animal("frog", "green", "pond", "flies", 4, "croaks", 3, "jump"),
    Animal("whale", "blue", "sea", "fish", 0, "sings", 13, "swim"),
    Animal("bee", "yellow", "hive", "nectar", 6, "buzzes", 0, "fly"),
    Animal("spider", "black", "attic", "flies", 8, "whispers", 1, "climb"),
    Animal("mouse", "grey", "mill", "cheese", 4, "squeaks", 2, "run"),
    Animal("rabbit", "white", "meadow", "carrots", 4, "thumps", 5, "jump"),
)
SKILLS = ("run", "fly", "climb", "swim", "jump", "walk")

JOBS = (
    Job("baker", "makes", "bread", "oven"),
    Job("fisher", "catches", "fish", "net"),
    Job("farmer", "grows", "corn", "plough"),
    Job("painter", "paints", "pictures", "brush"),
    Job("carpenter", "builds", "chairs", "hammer"),
    Job("doctor", "heals", "people", "needle"),
    Job("smith", "forges", "bells", "anvil"),
    Job("gardener", "grows", "flowers", "spade"),
)
PEOPLE = (
    Person("Ada", "baker", "village", "cat", "red", "apples"),
    Person("Tom", "fisher", "harbour", "dog", "blue", "plums"),
    Person("Mia", "painter", "tower", "owl", "purple", "cherries"),
    Person("Ben", "farmer", "farm", "horse", "green", "pears"),
    Person("Lena", "doctor", "village", "rabbit", "white", "grapes"),
    Person("Otto", "smith", "mountain", "mouse", "black", "apples"),
    Person("Rosa", "gardener", "garden", "frog", "pink", "cherries"),
    Person("Max", "carpenter", "forest", "duck", "brown", "plums"),
)
THINGS = {
    "sky": "blue",
    "grass": "green",
    "snow": "white",
    "sun": "yellow",
    "moon": "white",
    "fire": "orange",
    "sea": "blue",
    "apple": "red",
    "cherry": "red",
    "bread": "brown",
    "rose": "pink",
    "stone": "grey",
}
MIXES = {
    ("red", "blue"): "purple",
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
    ("red", "green"): "brown",
}
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("old", "young"),
    ("fast", "slow"),
    ("happy", "sad"),
    ("up", "down"),
    ("left", "right"),
    ("full", "empty"),
    ("good", "bad"),
    ("wet", "dry"),
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SEASONS = {"spring": "warm", "summer": "hot", "autumn": "windy", "winter": "cold"}
# place -> (direction, neighbour): the place lies in that direction from its neighbour.
PLACES = {
    "forest": ("north", "village"),
    "harbour": ("east", "village"),
    "farm": ("south", "village"),
    "mountain": ("west", "village"),
    "river": ("east", "forest"),
    "meadow": ("south", "farm"),
    "sea": ("east", "harbour"),
    "tower": ("west", "mountain"),
}
COLOURS = tuple(sorted({a.colour for a in ANIMALS} | set(THINGS.values())))
