"""Whether Hopper's matrix products read what they should, seen in a disassembly: two faults of ptxas.

A wgmma reads its operands where descriptors say, which are in uniform registers. Their low word is an address in shared
memory, so it is made of the address where that begins (a special register tells it) and of offsets. ptxas 12.8 makes
some from registers that hold a parameter of the kernel, or that nothing was written to
(`kernels/triton/assembling.py`); on an H200 exactly the kernels with such a descriptor computed wrong numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_UNIFORM = re.compile(r"(?<!\w)UR(\d+)")
#: Groups of products under way that are told apart; a wait for all but more of them has not been seen.
_MOST_GROUPS = 4


class _Instruction(NamedTuple):
    address: str
    predicated: bool
    opcode: str
    operands: list[str]

    def writes(self, register: int) -> bool:
        """Tell whether a uniform register is (part of) the destination."""
        found = _UNIFORM.match(self.operands[0]) if self.operands else None
        if found is None:
            return False
        wide = 2 if re.search(r"\.(?:64|WIDE)\b", self.opcode) else 4 if ".128" in self.opcode else 1
        return 0 <= register - int(found[1]) < wide

    def vectors(self) -> range:
        """Return the vector registers that are the destination (of an instruction that has one)."""
        operands = self.operands[1:] if self.operands and re.match(r"!?U?P[0-9T]", self.operands[0]) else self.operands
        found = re.match(r"R(\d+)\b", operands[0]) if operands else None
        size = re.search(r"\.(64|128|WIDE)\b", self.opcode)
        width = {"64": 2, "WIDE": 2, "128": 4}[size[1]] if size else 1
        return range(int(found[1]), int(found[1]) + width) if found else range(0)

    def reads(self) -> set[int]:
        """Return the uniform registers among the sources."""
        read: set[int] = set()
        for operand in self.operands[1:]:
            for found in _UNIFORM.finditer(operand):
                read |= {int(found[1]), int(found[1]) + (".64" in operand)}
        return read


def bad_descriptors(sass: str) -> list[str]:
    """Return a line for each descriptor of a wgmma that is not made of an address in shared memory; none is well."""
    flow = _Flow(sass)
    wanted = []
    for at, (_, _, opcode, operands) in enumerate(flow.code):
        if re.match(r"[HQI]GMMA\b", opcode):
            from_registers = re.match(r"R\d", operands[1])  # then the first half of the descriptors is not read
            for first in map(int, re.findall(r"gdesc\[UR(\d+)\]", ",".join(operands))):
                wanted += [(at, low) for low in ((first + 2,) if from_registers else (first, first + 2))]
    sound = flow.addresses(wanted)
    return [f"{flow.code[at].address} {flow.code[at].opcode} UR{low}" for at, low in wanted if not sound(at, low)]


def overwritten_inputs(sass: str) -> list[str]:
    """Return a line for each wgmma whose register input is written to while it may still be read; none is well.

    Two causes are known. ptxas 12.9 does so to some (fixed in 13.3 according to CUDA's release notes). And where a
    product is still under way when its loop begins again, Triton's wait for it does not name the registers, so that the
    next turn may compute into them: an H200 found infinities in a few rows of thousands. Looked for on every way from
    each product to the wait for it.
    """
    code, before = _graph(sass)
    after: dict[int, list[int]] = defaultdict(list)
    for to, sources in before.items():
        for source in sources:
            after[source].append(to)
    found = []
    for at, (address, _, opcode, operands) in enumerate(code):
        inputs = re.match(r"R(\d+)", operands[1]) if re.match(r"[HQI]GMMA\b", opcode) else None
        if inputs is None:
            continue
        read = range(int(inputs[1]), int(inputs[1]) + 4)
        ahead = [(i, 0 if "gsb0" in operands else -1) for i in after[at]]  # groups committed after this product's
        seen = set(ahead)
        while ahead:
            i, later = ahead.pop()
            if i >= len(code):
                continue
            writer = code[i]
            if "GMMA" in writer.opcode:
                later = min(later + ("gsb0" in writer.operands), _MOST_GROUPS)
            elif writer.opcode.startswith("WARPGROUP.DEPBAR"):
                if later >= int(writer.operands[-1], 16):
                    continue
            elif not writer.opcode.startswith(("ST", "RED")) and not set(read).isdisjoint(writer.vectors()):
                found.append(f"{address} {opcode}: {writer.address} {writer.opcode} writes R{min(writer.vectors())}")
            steps = {(j, later) for j in after[i]} - seen
            seen |= steps
            ahead += steps
    return found


class _Flow:
    """The instructions, which may run just before each, and which of them set a uniform register that one reads."""

    def __init__(self, sass: str) -> None:
        self.code, self._before = _graph(sass)
        self._setters: dict[tuple[int, int], frozenset[int]] = {}

    def setters(self, at: int, register: int) -> frozenset[int]:
        """Return the instructions whose value of a register may arrive at one; -1 is none at all."""
        known = self._setters.get((at, register))
        if known is not None:
            return known
        found: set[int] = set()
        seen: set[int] = set()
        ahead = [at]
        while ahead:
            here = ahead.pop()
            if here == 0:  # other code that nothing leads to is where an indirect branch arrives: not judged
                found.add(-1)
            for i in self._before[here]:
                if i in seen:
                    continue
                seen.add(i)
                if self.code[i].writes(register):
                    found.add(i)
                if not self.code[i].writes(register) or self.code[i].predicated:
                    ahead.append(i)
        return self._setters.setdefault((at, register), frozenset(found))

    def addresses(self, wanted: list[tuple[int, int]]) -> Callable[[int, int], bool]:
        """Return what tells whether a register at an instruction holds an address, for those that are asked about."""
        involved: set[int] = {-1}
        ahead = [i for use in wanted for i in self.setters(*use)]
        while ahead:
            i = ahead.pop()
            if i not in involved:
                involved.add(i)
                ahead += [j for source in self.code[i].reads() for j in self.setters(i, source)]
        # What a special or a vector register gives is one; a sum is, if a part of it is on every way that leads there.
        doubtful = {i for i in involved if i < 0 or not self.code[i].opcode.startswith(("S2UR", "R2UR"))}
        sound = set(involved) - {-1}

        def holds(at: int, register: int) -> bool:
            return self.setters(at, register) <= sound

        changed = True
        while changed:
            lost = {i for i in doubtful & sound if not any(holds(i, source) for source in self.code[i].reads())}
            sound -= lost
            changed = bool(lost)
        return holds


def _graph(sass: str) -> tuple[list[_Instruction], dict[int, list[int]]]:
    """Return the instructions, and which ones may run just before each."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            operands = [operand.strip() for operand in found[4].split(",")]
            code.append(_Instruction(found[1], found[2] is not None, found[3], operands))
    before: dict[int, list[int]] = defaultdict(list)
    for at, (_, predicated, opcode, operands) in enumerate(code):
        kind = opcode.partition(".")[0]
        if kind == "BRA":
            target = re.search(r"\.L_x_\d+", operands[-1])
            if target:
                before[labels[target[0]]].append(at)
            predicated = predicated or len(operands) > 1  # BRA U, !UP0, target
        if kind not in ("BRA", "EXIT", "RET") or predicated:
            before[at + 1].append(at)
    return code, before
