"""What the ranks say of themselves to each other, and what follows from it: who is behind, who is to blame."""

import json
from collections.abc import Collection, Mapping
from typing import NamedTuple, Self

from ig_dist.errors import listed
from ig_dist.parallel.collectives import Collective, Standing


class Word(NamedTuple):
    """What a rank says of itself."""

    entered: int = 0
    """Phases that it has come to, as all ranks in one order; where the device is behind the host, that it has."""
    phase: str = "start-up"
    step: int = 0
    idle_s: float = 0.0
    left_s: float = 1.0  # until it would end the run
    ticks: int = 0  # grows while the process runs
    host: str = ""  # where its host is, which waits for the device; empty: the two are at the same place
    standing: Standing = Standing({}, None)  # empty while all is well

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return place(self.step, self.phase) + (" on its device" if self.host else "")

    @classmethod
    def loads(cls, text: str | bytes) -> Self:
        """From JSON."""
        word = cls(*json.loads(text))
        came, waits = word.standing
        return word._replace(standing=Standing(came, waits and Collective(*waits)))


def place(step: int, phase: str) -> str:
    """Where a run is, in words."""
    return f"step {step}, {phase}" if step else phase


def judge(words: Mapping[int, Word], silent: Collection[int], rank: int, machine: int) -> tuple[str, list[int]]:
    """Who is behind and what is waited for, in the words of rank ``rank``, and the ranks to blame.

    Somebody is to blame only with evidence: ranks of one machine (of ``machine`` ranks), at most half of all, that do
    not answer; or else that are behind the others; or else that did not come to a collective which others wait in.
    """
    if len(words) == 1:
        return "", []
    counts = {number: word.entered for number, word in words.items() if number not in silent}
    least = min(counts.values())
    late = [number for number, count in counts.items() if least == count < max(counts.values())]
    collective, absent = _waited_for(words, silent, rank)
    named = []
    for number in sorted([*silent, *late]):
        state = "does not answer" if number in silent else f"for {words[number].idle_s:.0f} s"
        named.append(f"rank {number} ({words[number].place}, {state})")
    suspects = sorted(silent) or late or absent
    evident = len({number // machine for number in suspects}) == 1 and 2 * len(suspects) <= len(words)
    said = f"; behind: {listed(named)}" if named else "" if absent else "; no rank is behind another"
    return f"{said}{collective}{'' if evident else '; no machine is blamed'}", suspects if evident else []


def _waited_for(words: Mapping[int, Word], silent: Collection[int], rank: int) -> tuple[str, list[int]]:
    """The collective that this rank waits in, or else another one, in words; and who did not come to it."""
    waiting = {number: waits for number, word in words.items() if (waits := word.standing.waits)}
    if not waiting:
        return "", []
    first = rank if rank in waiting else min(waiting)
    waits = waiting[first]
    came = {number: word.standing.came.get(waits.group, waits.number) for number, word in words.items()}
    absent = [number for number, newest in came.items() if newest < waits.number and number not in silent]
    who = "waits" if first == rank else f"rank {first} waits"
    without = f", to which {listed([f'rank {number}' for number in absent])} did not come" if absent else ""
    return f"; {who} for {waits.waited_s:.0f} s in {waits.text}{without}", absent
