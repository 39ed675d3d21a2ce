"""What the ranks say of themselves to each other, and what follows from it: who is behind, who is to blame."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from ig_dist.errors import listed
from ig_dist.parallel.collectives import Collective


@dataclass(frozen=True)
class Word:
    """What a rank says of itself."""

    count: int = 0
    """Phases that it has come to, as all ranks in one order; where the device is behind the host, that it has."""
    phase: str = "start-up"
    step: int = 0
    idle_s: float = 0.0
    left_s: float = 1.0  # until it would end the run
    ticks: int = 0  # grows while the process runs
    host: str = ""  # where its host is, which waits for the device; empty: the two are at the same place
    came: dict[str, int] = field(default_factory=dict)  # see ``Standing``; empty while all is well, as is the next
    waits: Collective | None = None

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return place(self.step, self.phase) + (" on its device" if self.host else "")

    def dumps(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> Word:
        """From text."""
        fields = json.loads(text)
        waits = fields.pop("waits")
        return cls(**fields, waits=Collective(*waits) if waits else None)


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
    counts = {number: word.count for number, word in words.items() if number not in silent}
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
    waiting = [number for number in sorted(words, key=lambda number: number != rank) if words[number].waits]
    if not waiting or (waits := words[waiting[0]].waits) is None:
        return "", []
    came = {number: word.came[waits.group] for number, word in words.items() if waits.group in word.came}
    absent = [number for number, newest in came.items() if newest < waits.number and number not in silent]
    who = "waits" if waiting[0] == rank else f"rank {waiting[0]} waits"
    without = f", to which {listed([f'rank {number}' for number in absent])} did not come" if absent else ""
    return f"; {who} for {waits.waited_s:.0f} s in {waits.text}{without}", absent
