# SPDX-License-Identifier: Apache-2.0
"""A pickle read as a description, never as a program.

A pickle names functions that its reader should import and call. The stack machine here interprets only the
opcodes that tensors in plain containers need, and it cannot import or call anything: ``GLOBAL`` yields a
name, and ``REDUCE`` compares that name with five known ones. Everything else is refused by name. Time and
memory are bounded by the size of the file.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch

MAX_OPCODES = 200_000  # a network of 344 tensors takes 12,000
MAX_COPIES = (
    4  # items copied out of shared containers, per opcode read; a plain OrderedDict needs less than 1
)
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Refused(Exception):
    """Content of a file that is not read; the reader of the file turns it into an InputError."""


@dataclass(frozen=True)
class Global:
    """The name of a module attribute; it is never looked up."""

    name: str


@dataclass(frozen=True)
class StorageRef:
    """A flat array of numbers that is stored elsewhere in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Machine:
    """Interprets one pickle: dict, list, tuple, plain values, ``Global``, ``StorageRef`` and
    ``TensorRef``.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.num_opcodes = 0
        self.num_copied = 0

    def run(self, source: IO[bytes]) -> Any:
        """Return the value of the pickle at the position of ``source``, which is moved behind it."""
        for opcode, argument, _ in pickletools.genops(source):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.num_opcodes += 1
            if self.num_opcodes > MAX_OPCODES:
                raise Refused(f"a pickle of more than {MAX_OPCODES} opcodes")
            action = ACTIONS.get(opcode.name)
            if action is None:
                raise Refused(f"pickle opcode {opcode.name}")
            action(self, argument)
        raise Refused("a pickle without end")

    def push(self, value: Any) -> None:
        """Put ``value`` on the stack."""
        self.stack.append(value)

    def copy(self, items: Any) -> Any:
        """Return ``items``, refused when this pickle copies shared containers more often than its size
        allows.
        """
        self.num_copied += len(items)
        if self.num_copied > MAX_COPIES * self.num_opcodes:
            raise Refused("a pickle that copies the same container again and again")
        return items

    def since_mark(self) -> list[Any]:
        """Pop everything above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def take(self, count: int) -> list[Any]:
        """Pop ``count`` values."""
        if count > len(self.stack):
            raise Refused("a pickle that pops more than it pushed")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def fill(self, pairs: list[Any]) -> None:
        """Put keys and values into the dict on top of the stack."""
        target = self.stack[-1]
        if type(target) is not dict or any(type(key) not in (str, int) for key in pairs[::2]):
            raise Refused("items for something that is not a plain dict")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        """Put items at the end of the list on top of the stack."""
        if type(self.stack[-1]) is not list:
            raise Refused("items for something that is not a plain list")
        self.stack[-1].extend(items)

    def reduce(self) -> None:
        """Interpret a call: five names are known, every other is refused."""
        function, arguments = self.take(2)
        if type(function) is not Global or type(arguments) is not tuple or function.name not in REDUCIBLE:
            raise Refused(f"a call of {name_of(function)}")
        for argument in arguments:
            if type(argument) in (dict, list):
                self.copy(argument)
        self.push(REDUCIBLE[function.name](*arguments))

    def new(self) -> None:
        """Interpret the creation of an object: a TorchScript module becomes an empty dict."""
        kind, arguments = self.take(2)
        if type(kind) is not Global or not kind.name.startswith("__torch__.") or arguments != ():
            raise Refused(f"an object of {name_of(kind)}")
        self.push({})

    def build(self) -> None:
        """Set attributes: those of a module become items of its dict; those of an OrderedDict are dropped."""
        (state,) = self.take(1)
        if type(self.stack[-1]) is not dict or type(state) is not dict:
            raise Refused("attributes for something that is not a module")
        if "_metadata" not in state:
            self.stack[-1].update(self.copy(state))

    def persistent(self) -> None:
        """('storage', type, key, location, numel, ...) -> StorageRef."""
        (pid,) = self.take(1)
        marker, kind, key, _, numel = pid[:5] if type(pid) is tuple and len(pid) >= 5 else (None,) * 5
        name = kind.name.removeprefix("torch.") if type(kind) is Global else "unknown kind"
        if marker != "storage" or name not in DTYPES or type(key) is not str or type(numel) is not int:
            raise Refused(f"a storage of {name}")
        self.push(StorageRef(key, DTYPES[name], numel))

    def remember(self, index: int | None) -> None:
        """Store the top of the stack under ``index`` (None: the next free one)."""
        if index is None:
            index = len(self.memo)
        self.memo[index] = self.stack[-1]

    def name(self, argument: str | None) -> None:
        """Push a global name; ``argument`` None pops module and name."""
        module, name = self.take(2) if argument is None else argument.split(" ", 1)
        self.push(Global(f"{module}.{name}"))


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    """Interpret torch._utils._rebuild_tensor_v2; gradients and hooks are dropped."""
    counts = [offset, *size, *stride]
    if (
        type(storage) is not StorageRef
        or len(size) != len(stride)
        or any(type(n) is not int or n < 0 for n in counts)
    ):
        raise Refused("a tensor that is not a plain view of a storage")
    return TensorRef(storage, offset, tuple(size), tuple(stride))


REDUCIBLE: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": lambda pairs=(): dict(pairs),
    "torch.jit._pickle.build_intlist": lambda items: list(items),
    "torch.jit._pickle.restore_type_tag": lambda value, kind: value,
}


def name_of(value: Any) -> str:
    """Return the name of a global, the type's of any other value."""
    if type(value) is Global:
        return value.name
    return type(value).__name__


def constant(value: Any) -> Callable[[Machine, Any], None]:
    """Return an action that pushes a copy of ``value``."""
    return lambda machine, _: machine.push(value.copy() if isinstance(value, (dict, list)) else value)


def literal(machine: Machine, argument: Any) -> None:
    """Push a value that is stored in the pickle."""
    machine.push(argument)


def tuple_of(count: int) -> Callable[[Machine, Any], None]:
    """Return an action that makes a tuple of the last ``count`` values."""
    return lambda machine, _: machine.push(tuple(machine.take(count)))


ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING"),
        literal,
    ),
    **{
        "SHORT_BINSTRING": literal,
        "NONE": constant(None),
        "NEWTRUE": constant(True),
        "NEWFALSE": constant(False),
    },
    **{"EMPTY_DICT": constant({}), "EMPTY_LIST": constant([]), "EMPTY_TUPLE": constant(())},
    **{"TUPLE1": tuple_of(1), "TUPLE2": tuple_of(2), "TUPLE3": tuple_of(3)},
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "APPEND": lambda machine, _: machine.extend(machine.take(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.fill(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.fill(machine.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), Machine.name),
    "BINPERSID": lambda machine, _: machine.persistent(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "NEWOBJ": lambda machine, _: machine.new(),
    "BUILD": lambda machine, _: machine.build(),
}
