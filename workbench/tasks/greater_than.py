"""Greater-Than: "The war lasted from the year 1732 to the year 17" -> any of "33" to "99".

A thing that lasts ends after it began, so the two digits that follow must be larger than those of the first year. The
corrupted prompt begins in year 01 of the same century: every end from 01 on is possible, and the bound is gone.

`greater_than_century` removes the bound without making the corrupted prompts more alike than the clean ones: the thing
begins a century earlier ("from the year 1632 to the year 17"), in the same year of it. Corrupted prompts that all end
in 01 vary less than clean ones, and any head that reads the year then looks as if it told them apart.

The first year is uniform from 02 to 98, so there is always something on either side. Tokenizers that write one token
per digit are scored on the tens alone (see `Prompt`): years with nothing left on one side, 02-09 and from 90 on, are
then drawn again.

Hanna, Liu & Variengien 2023, "How does GPT-2 compute greater-than?", section 2. The nouns are our own.
"""

from __future__ import annotations

import random

from workbench.prompts import Prompt
from workbench.registry import task

NOUNS = (
    "war", "campaign", "trial", "conflict", "siege", "reign", "rule", "crisis", "drought", "famine", "plague",
    "rebellion", "revolution", "occupation", "peace", "treaty", "alliance", "boom", "depression", "recession",
    "expedition", "voyage", "journey", "mission", "tour", "festival", "tournament", "strike", "boycott", "protest",
    "dispute", "debate", "investigation", "construction", "restoration", "renovation", "epidemic", "outbreak",
    "blockade", "embargo", "invasion", "uprising", "revolt", "rivalry", "marriage", "partnership", "career", "exile",
    "imprisonment", "tradition", "fashion", "era", "dynasty", "empire", "republic", "regime", "government",
    "administration", "presidency", "colony", "settlement", "migration", "experiment", "study", "survey", "program",
    "operation", "contract", "lease", "agreement", "battle", "struggle", "movement", "monopoly", "friendship",
)  # fmt: skip
CENTURIES = range(12, 20)


ENDS = tuple(f"{end:02}" for end in range(100))


def _lasted(noun: str, first: int, year: int, last: int) -> str:
    return f"The {noun} lasted from the year {first}{year:02} to the year {last}"


@task("greater_than", metric="prob_diff", version=1)
def greater_than(rng: random.Random) -> Prompt:
    """Greater-Than: in which year a thing ended, given the year in which it began."""
    noun, century, year = rng.choice(NOUNS), rng.choice(CENTURIES), rng.randint(2, 98)
    clean, corrupted = _lasted(noun, century, year, century), _lasted(noun, century, 1, century)
    return Prompt(clean, corrupted, ENDS[year + 1 :], ENDS[: year + 1])


@task("greater_than_century", metric="prob_diff", version=1)
def greater_than_century(rng: random.Random) -> Prompt:
    """Greater-Than against a beginning one century earlier, which leaves the end free and varies as much."""
    noun, century, year = rng.choice(NOUNS), rng.choice(CENTURIES), rng.randint(2, 98)
    clean, corrupted = (_lasted(noun, first, year, century) for first in (century, century - 1))
    return Prompt(clean, corrupted, ENDS[year + 1 :], ENDS[: year + 1])
