"""PTX text -> kernels made of instructions.

Only structure is decided here: names are resolved to declarations (inline-assembly blocks in braces have their own
registers and labels), operands get a shape. What an instruction means is decided in `lowering.py`.
Grammar: PTX ISA 9.0, sections 4 (syntax), 5 (state spaces), 6 (operands).
"""

from __future__ import annotations

import re
import struct

from fa4_backend.emulator.errors import PtxSyntaxError, UnsupportedInstruction
from fa4_backend.emulator.syntax import (
    TYPE_BYTES,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Not,
    Operand,
    Pair,
    Parameter,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SPACE = re.compile(r"\s+")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_NAME = re.compile(r"[A-Za-z_$%][\w$.]*")
_NUMBER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_VARIABLE = re.compile(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*((?:\[[^\]]*\])*)\s*(?:=\s*(\{.*\}|[^;]+))?$", re.S)
_DECIMAL = re.compile(r"[-+]?\d+\.\d*(?:[eE][-+]?\d+)?$")
_RANGE = re.compile(r"([\w$%]+)<(\d+)>$")


def _blank(match: re.Match[str]) -> str:
    return "\n" * match.group().count("\n")


def parse_module(text: str) -> dict[str, Kernel]:
    """Parse a PTX module. Returns its kernels by name; raises `PtxSyntaxError` or `UnsupportedInstruction`."""
    return _Parser(text).module()


class _Scope:
    """Registers and labels visible in a pair of braces."""

    def __init__(self, parent: _Scope | None) -> None:
        self.parent = parent
        self.registers: dict[str, Register] = {}
        self.ranges: dict[str, tuple[int, str]] = {}
        self.labels: dict[str, int] = parent.labels.copy() if parent else {}
        self.pending: list[Instruction] = []


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = _COMMENT.sub(_blank, text.rstrip("\0 \n\t\r"))
        self.pos = 0
        self.target = ""
        self.globals: dict[str, Variable] = {}
        self.kernels: dict[str, Kernel] = {}
        self.line_starts = [m.end() for m in re.finditer(r"\n", self.text)]
        self.kernel: Kernel | None = None
        self.scope = _Scope(None)
        self.operand_cache: dict[str, Operand] = {}

    # -- characters ---------------------------------------------------------------------------------------------

    def line(self, pos: int | None = None) -> int:
        from bisect import bisect_right

        return bisect_right(self.line_starts, self.pos if pos is None else pos) + 1

    def fail(self, message: str) -> PtxSyntaxError:
        return PtxSyntaxError(f"PTX line {self.line()}: {message}")

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.pos)
        if match:
            self.pos = match.end()

    def until(self, stop: str) -> str:
        end = self.text.find(stop, self.pos)
        if end < 0:
            raise self.fail(f"text ends where {stop!r} was expected: the PTX is truncated")
        part = self.text[self.pos : end]
        self.pos = end + len(stop)
        return part

    # -- module level -------------------------------------------------------------------------------------------

    def module(self) -> dict[str, Kernel]:
        while True:
            self.skip_space()
            if self.pos >= len(self.text):
                break
            self.module_item()
        if not self.kernels:
            raise PtxSyntaxError("no .entry found: the PTX is empty or truncated")
        return self.kernels

    def module_item(self) -> None:
        if self.text.startswith((".version", ".target", ".address_size"), self.pos):
            end = self.text.find("\n", self.pos)
            words = self.text[self.pos : end if end >= 0 else None].replace(",", " ").split()
            if words[0] == ".target":
                self.target = words[1]
            self.pos = end if end >= 0 else len(self.text)
            return
        if self.text.startswith(".section", self.pos):
            self.skip_braces()
            return
        if self.text.startswith((".file", ".pragma"), self.pos):
            end = self.text.find("\n", self.pos)
            self.pos = end if end >= 0 else len(self.text)
            return
        header_end = re.compile(r"[;({]|\)").search(self.text, self.pos)
        if header_end is None:
            raise self.fail("unfinished declaration: the PTX is truncated")
        head = self.text[self.pos : header_end.start()]
        if re.search(r"\.entry\b", head):
            self.entry()
        elif re.search(r"\.func\b", head):
            self.skip_function()
        else:
            self.variable(self.until(";").strip(), self.globals)

    def skip_braces(self) -> None:
        depth = 0
        for match in re.compile(r"[{}]").finditer(self.text, self.pos):
            depth += 1 if match.group() == "{" else -1
            if depth == 0:
                self.pos = match.end()
                return
        raise self.fail("unbalanced braces: the PTX is truncated")

    def skip_function(self) -> None:
        """Device functions are accepted as declarations; a `call` to one is refused where it is lowered."""
        body = self.text.find("{", self.pos)
        end = self.text.find(";", self.pos)
        if body >= 0 and (end < 0 or body < end):
            self.skip_braces()
        else:
            self.until(";")

    def variable(self, text: str, into: dict[str, Variable]) -> None:
        space = re.search(r"\.(shared|local|global|const)\b", text)
        if not space:
            raise self.fail(f"unknown declaration {text[:80]!r}")
        rest = re.sub(r"\.(extern|visible|weak|shared|local|global|const)\b|\.attribute\([^)]*\)", "", text).strip()
        match = _VARIABLE.match(rest)
        if not match:
            raise self.fail(f"unknown declaration {text[:80]!r}")
        align, kind, name, dims, initial = match.groups()
        size, count, dynamic = TYPE_BYTES[kind], 1, False
        for dim in re.findall(r"\[([^\]]*)\]", dims):
            dynamic = dynamic or not dim.strip()
            count *= int(dim) if dim.strip() else 0
        data = b""
        if initial:
            values = [int(v, 0) for v in re.findall(r"-?\w+", initial)]
            data = b"".join((v & ((1 << 8 * size) - 1)).to_bytes(size, "little") for v in values)
        into[name] = Variable(name, space.group(1), int(align or size), size * count, dynamic, data)

    # -- kernels ------------------------------------------------------------------------------------------------

    def entry(self) -> None:
        head = self.until("(")
        name = head.split()[-1]
        kernel = Kernel(name, self.target, {})
        offset = 0
        for text in filter(None, (t.strip() for t in self.until(")").split(","))):
            param = self.parameter(text)
            offset = -(-offset // param.align) * param.align
            param.offset, offset = offset, offset + param.num_bytes
            kernel.params[param.name] = param
        for word, numbers in re.findall(r"\.(\w+)([^.]*)", self.until("{")):
            kernel.directives[word] = tuple(int(n) for n in re.findall(r"\d+", numbers))
        kernel.variables.update(self.globals)
        self.kernel, self.scope, self.operand_cache = kernel, _Scope(None), {}
        self.body()
        for variable in self.globals.values():
            kernel.variables.setdefault(variable.name, variable)
        self.kernels[name] = kernel

    def parameter(self, text: str) -> Parameter:
        match = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[^%\w$]*(?:\.\w+\s*(?:\d+\s+)?)*)?([\w$]+)(?:\[(\d+)\])?$", text
        )
        if not match:
            raise self.fail(f"unknown parameter {text[:80]!r}")
        align, kind, name, count = match.groups()
        size = TYPE_BYTES[kind]
        return Parameter(name, size * int(count or 1), int(align or size))

    def body(self) -> None:
        depth = 1
        while depth:
            self.skip_space()
            if self.pos >= len(self.text):
                raise self.fail("the kernel body has no end: the PTX is truncated")
            char = self.text[self.pos]
            if char == "{":
                self.pos += 1
                depth += 1
                self.scope = _Scope(self.scope)
            elif char == "}":
                self.pos += 1
                depth -= 1
                self.close_scope()
            elif label := _LABEL.match(self.text, self.pos):
                self.pos = label.end()
                self.label(label.group(1))
            else:
                line = self.line()
                self.statement(_SPACE.sub(" ", self.until(";")).strip(), line)

    def close_scope(self) -> None:
        scope = self.scope
        for instruction in scope.pending:
            instruction.labels = scope.labels
        if scope.parent is not None:
            # Labels of enclosing scopes may be defined later: the parent closes over the same instructions too.
            scope.parent.pending.extend(i for i in scope.pending if not _targets_known(i))
            self.scope = scope.parent
        else:
            for instruction in scope.pending:
                if not _targets_known(instruction):
                    raise PtxSyntaxError(f"PTX line {instruction.line}: unknown label in {instruction.text!r}")

    def label(self, name: str) -> None:
        assert self.kernel is not None
        rest = re.compile(r"\s*\.branchtargets\b").match(self.text, self.pos)
        if rest:
            self.pos = rest.end()
            self.kernel.branch_tables[name] = [t.strip() for t in self.until(";").split(",")]
            return
        if re.compile(r"\s*\.callprototype\b").match(self.text, self.pos):
            self.until(";")
            return
        self.scope.labels[name] = len(self.kernel.instructions)

    def statement(self, text: str, line: int) -> None:
        assert self.kernel is not None
        if not text:
            return
        if text.startswith("."):
            self.directive(text)
            return
        guard, negated = None, False
        source = text
        if text[0] == "@":
            head, _, text = text.partition(" ")
            text = text.strip()
            negated = head[1] == "!"
            operand = self.operand(head[2:] if negated else head[1:])
            if not isinstance(operand, Register) or operand.type != "pred":
                raise PtxSyntaxError(f"PTX line {line}: guard is not a predicate in {source!r}")
            guard = operand
        opcode, _, rest = text.partition(" ")
        instruction = Instruction(opcode, self.operands(rest), guard, negated, line, source, {})
        self.kernel.instructions.append(instruction)
        if opcode.startswith(("bra", "brx")):
            self.scope.pending.append(instruction)

    def directive(self, text: str) -> None:
        assert self.kernel is not None
        word = text.split()[0]
        if word == ".reg":
            _, kind, names = text.split(None, 2)
            for name in (n.strip() for n in names.split(",")):
                ranged = _RANGE.match(name)
                if ranged:
                    self.scope.ranges[ranged.group(1)] = (int(ranged.group(2)), kind[1:])
                else:
                    self.scope.registers[name] = self.new_register(name, kind[1:])
            if kind[1:] not in TYPE_BYTES:
                raise UnsupportedInstruction(f"register type {kind} in {text!r}")
            self.operand_cache = {}
        elif word in (".shared", ".local", ".const", ".global"):
            self.variable(text, self.kernel.variables)
        elif word not in (".loc", ".pragma", ".file"):
            raise UnsupportedInstruction(f"directive {text[:80]!r}")

    def new_register(self, name: str, kind: str) -> Register:
        assert self.kernel is not None
        register = Register(name, kind, len(self.kernel.registers))
        self.kernel.registers.append(register)
        return register

    def find_register(self, name: str) -> Register | None:
        scope: _Scope | None = self.scope
        while scope is not None:
            found = scope.registers.get(name)
            if found is not None:
                return found
            stem = name.rstrip("0123456789")
            limit = scope.ranges.get(stem)
            if limit and stem != name and int(name[len(stem) :]) < limit[0]:
                register = self.new_register(name, limit[1])
                scope.registers[name] = register
                return register
            scope = scope.parent
        return None

    # -- operands -----------------------------------------------------------------------------------------------

    def operands(self, text: str) -> tuple[Operand, ...]:
        return tuple(self.operand(part) for part in _split(text))

    def operand(self, text: str) -> Operand:
        # Names resolve by scope, so the cache lives only as long as the innermost block.
        key = text
        if self.scope.parent is None and key in self.operand_cache:
            return self.operand_cache[key]
        value = self.parse_operand(text)
        if self.scope.parent is None:
            self.operand_cache[key] = value
        return value

    def parse_operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        first = text[0]
        if first == "{":
            return Vector(self.operands(text[1:-1]))
        if first == "[":
            return self.address(text[1:-1])
        if first == "!":
            return Not(self.operand(text[1:].strip()))
        if "|" in text:
            left, right = text.split("|")
            return Pair(self.operand(left.strip()), self.operand(right.strip()))
        if first.isdigit() or first in "-+":
            return _number(text, self)
        register = self.find_register(text)
        if register is not None:
            return register
        if first == "%":
            return Special(text)
        if _NAME.fullmatch(text):
            return Symbol(text)
        raise self.fail(f"unknown operand {text!r}")

    def address(self, text: str) -> Operand:
        parts = _split(text)
        base, offset = parts[0], 0
        match = re.match(r"(.*?)\s*([+-])\s*(-?\w+)$", base)
        if match and match.group(1):
            base, offset = match.group(1), int(match.group(3), 0) * (1 if match.group(2) == "+" else -1)
        if re.fullmatch(r"-?\d+|0[xX]\w+", base):
            where: Operand | None = Immediate(int(base, 0))
        else:
            where = self.operand(base)
        coords: tuple[Operand, ...] = ()
        extra: list[Operand] = []
        for part in parts[1:]:
            value = self.operand(part)
            if isinstance(value, Vector) and not coords:
                coords = value.items
            else:
                extra.append(value)
        return Address(where, offset, coords, tuple(extra))


def _targets_known(instruction: Instruction) -> bool:
    target = instruction.operands[-1]
    if instruction.opcode.startswith("brx"):
        return True
    return isinstance(target, Symbol) and target.name in instruction.labels


def _split(text: str) -> list[str]:
    """Split at commas that are outside of every bracket."""
    if "{" not in text and "[" not in text:
        return [part for part in (p.strip() for p in text.split(",")) if part]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _number(text: str, parser: _Parser) -> Immediate:
    if text[:2] in ("0f", "0F") and len(text) == 10:
        return Immediate(int(text[2:], 16), 4)
    if text[:2] in ("0d", "0D") and len(text) == 18:
        return Immediate(int(text[2:], 16), 8)
    if _NUMBER.match(text):
        return Immediate(int(text.rstrip("U"), 0))
    if _DECIMAL.match(text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    raise parser.fail(f"unknown number {text!r}")
