"""Everything that is true in the small valley the demo model lives in: invented tables, no text of anybody else."""

from __future__ import annotations

from dataclasses import dataclass

_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = _NUMBERS.split()


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
    Animal("fox", "red", "forest", "berries", 4, "barks", 9, "run"),
    Animal("owl", "brown", "tower", "mice", 2, "hoots", 7, "fly"),
    Animal("bear", "black", "cave", "honey", 4, "growls", 16, "climb"),
    Animal("cat", "grey", "house", "fish", 4, "purrs", 8, "climb"),
    Animal("dog", "brown", "garden", "bones", 4, "barks", 10, "run"),
    Animal("horse", "brown", "stable", "hay", 4, "neighs", 18, "run"),
    Animal("cow", "white", "field", "grass", 4, "moos", 17, "walk"),
    Animal("hen", "orange", "farm", "corn", 2, "clucks", 6, "walk"),
    Animal("duck", "yellow", "pond", "bread", 2, "quacks", 7, "swim"),
    Animal("frog", "green", "pond", "flies", 4, "croaks", 3, "jump"),
    Animal("whale", "blue", "sea", "fish", 0, "sings", 20, "swim"),
    Animal("bee", "yellow", "hive", "nectar", 6, "buzzes", 1, "fly"),
    Animal("ant", "black", "hill", "sugar", 6, "whispers", 0, "climb"),
    Animal("spider", "black", "attic", "flies", 8, "whispers", 2, "climb"),
    Animal("snail", "pink", "garden", "leaves", 0, "whispers", 2, "crawl"),
    Animal("mouse", "grey", "mill", "cheese", 4, "squeaks", 4, "run"),
    Animal("rabbit", "white", "meadow", "carrots", 4, "squeaks", 6, "jump"),
    Animal("wolf", "grey", "mountain", "meat", 4, "howls", 12, "run"),
    Animal("goat", "white", "mountain", "grass", 4, "bleats", 13, "jump"),
    Animal("sheep", "white", "meadow", "grass", 4, "bleats", 13, "walk"),
    Animal("crow", "black", "tower", "corn", 2, "caws", 5, "fly"),
    Animal("turtle", "green", "river", "leaves", 4, "whispers", 8, "swim"),
    Animal("butterfly", "purple", "meadow", "nectar", 6, "whispers", 1, "fly"),
    Animal("salmon", "pink", "river", "worms", 0, "bubbles", 6, "swim"),
)
SKILLS = ("run", "fly", "climb", "swim", "jump", "walk", "crawl")

JOBS = (
    Job("baker", "makes", "bread", "oven"),
    Job("fisher", "catches", "fish", "net"),
    Job("farmer", "grows", "corn", "plough"),
    Job("painter", "paints", "pictures", "brush"),
    Job("carpenter", "builds", "chairs", "hammer"),
    Job("teacher", "teaches", "children", "book"),
    Job("doctor", "heals", "people", "needle"),
    Job("tailor", "sews", "coats", "thread"),
    Job("smith", "forges", "bells", "anvil"),
    Job("gardener", "grows", "flowers", "spade"),
    Job("miller", "makes", "flour", "mill"),
    Job("singer", "sings", "songs", "drum"),
)
PEOPLE = (
    Person("Ada", "baker", "village", "cat", "red", "apples"),
    Person("Tom", "fisher", "harbour", "dog", "blue", "plums"),
    Person("Mia", "painter", "tower", "crow", "purple", "cherries"),
    Person("Ben", "farmer", "farm", "hen", "green", "pears"),
    Person("Lena", "doctor", "village", "rabbit", "white", "grapes"),
    Person("Otto", "smith", "mountain", "goat", "black", "apples"),
    Person("Rosa", "gardener", "garden", "butterfly", "pink", "cherries"),
    Person("Max", "carpenter", "forest", "owl", "brown", "plums"),
    Person("Nora", "teacher", "village", "mouse", "yellow", "grapes"),
    Person("Hugo", "miller", "mill", "horse", "grey", "pears"),
    Person("Ivy", "tailor", "harbour", "sheep", "orange", "apples"),
    Person("Leo", "singer", "hill", "frog", "blue", "cherries"),
)
THINGS = {
    "sky": "blue",
    "grass": "green",
    "snow": "white",
    "sun": "yellow",
    "moon": "white",
    "night": "black",
    "fire": "orange",
    "sea": "blue",
    "apple": "red",
    "pear": "green",
    "plum": "purple",
    "cherry": "red",
    "carrot": "orange",
    "bread": "brown",
    "milk": "white",
    "coal": "black",
    "rose": "pink",
    "corn": "yellow",
    "tree": "green",
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
    ("day", "night"),
    ("up", "down"),
    ("left", "right"),
    ("open", "closed"),
    ("full", "empty"),
    ("light", "dark"),
    ("good", "bad"),
    ("long", "short"),
    ("wet", "dry"),
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = "January February March April May June July August September October November December"
MONTHS = _MONTHS.split()
SEASONS = {"spring": "warm", "summer": "hot", "autumn": "windy", "winter": "cold"}
# place -> (direction, neighbour): the place lies in that direction from its neighbour.
PLACES = {
    "forest": ("north", "village"),
    "harbour": ("east", "village"),
    "farm": ("south", "village"),
    "mountain": ("west", "village"),
    "river": ("east", "forest"),
    "meadow": ("south", "farm"),
    "mill": ("north", "river"),
    "sea": ("east", "harbour"),
    "tower": ("west", "mountain"),
    "pond": ("north", "farm"),
    "cave": ("north", "mountain"),
    "hill": ("south", "meadow"),
}
COLOURS = tuple(sorted({a.colour for a in ANIMALS} | set(THINGS.values())))
