"""An interpreter of pickles that builds stand-ins, and no more of them than a bound.

A pickle is a program. Here only the opcodes that checkpoints use are known; what a name stands for is said by
`pickle_names`. Every opcode, and every element that one copies, counts against MOST_STEPS; keys are plain, so that no
hash or comparison can take long; the text of a value is never made.

Source: opcodes as in the standard library's `pickletools`.
"""

import pickletools
from collections.abc import Callable
from typing import Any

from jaxmed.io.pickle_names import (
    Global,
    NumpyArray,
    NumpyDtype,
    Tensor,
    Unread,
    as_key,
    build,
    named,
    typed,
    with_state,
)

MOST_STEPS = 1_000_000  # a checkpoint of 800 tensors with its optimizer takes 60,000
MOST_DEPTH = 100
PUSHED = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING")
    + ("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE")
    + ("BINUNICODE", "BINUNICODE8")
)
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}


class TooMuch(ValueError):
    """A bound was passed; the argument says which, after the word "expected"."""


class UnknownOpcode(ValueError):
    """An opcode that no checkpoint has; the argument is its name."""


class Budget:
    """Steps that are left, or bytes.

    Args:
        most: How many.
        what: What they are, for the message.
    """

    def __init__(self, most: int, what: str = "values and copies in the pickle"):
        self.most, self.left, self.what = most, most, what

    def spend(self, steps: int) -> None:
        """Count steps.

        Raises:
            TooMuch: None are left.
        """
        self.left -= steps
        if self.left < 0:
            raise TooMuch(f"at most {self.most:,} {self.what}")


class Interpreter:
    """Runs the opcodes of one pickle.

    Args:
        persistent: What a reference to something outside stands for.
        budget: Shared by the pickles of a file.
    """

    def __init__(self, persistent: Callable[[Any], Any], budget: Budget):
        self.persistent, self.budget = persistent, budget
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        """Return what the pickle makes, given something with `read` and `readline`.

        Raises:
            TooMuch: It makes too much.
            UnknownOpcode: It is not of a checkpoint.
            ValueError: It is damaged; as are those that end in an IndexError, KeyError or TypeError.
        """
        budget = self.budget
        for opcode, arg, _ in pickletools.genops(file):
            name = opcode.name
            budget.left -= 1  # `spend` would take as long as the rest
            if budget.left < 0:
                budget.spend(0)
            if name == "STOP":
                return self.stack.pop()
            if name in PUSHED:
                self.stack.append(arg)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name]())
            else:
                self.step(name, arg)
        raise EOFError("the pickle has no end")

    def step(self, name: str, arg: Any) -> None:
        """Do what an opcode says that is neither a value nor the end."""
        stack = self.stack
        match name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[arg])
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "TUPLE":
                self.collect(tuple)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(self.top(count))]
            case "APPEND" | "APPENDS" | "ADDITEMS" | "SETITEM" | "SETITEMS":
                self.fill(name)
            case "REDUCE" | "NEWOBJ":
                function, args = self.top(2)
                stack[-2:] = [self.build(function, typed(args, tuple))]
            case "NEWOBJ_EX":
                function, args, options = self.top(3)
                stack[-3:] = [Unread(str(typed(function, Global)), (*typed(args, tuple), typed(options, dict)))]
            case "BUILD":
                state = stack.pop()
                self.budget.spend(len(state) if isinstance(state, dict) else 1)
                stack[-1] = with_state(stack[-1], state)
            case "GLOBAL":
                stack.append(named(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                module, attribute = self.top(2)
                stack[-2:] = [named(typed(module, str), typed(attribute, str))]
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case "POP":
                stack.pop() if stack else self.items()
            case "POP_MARK":
                self.items()
            case "DUP":
                stack.append(stack[-1])
            case "LIST":
                self.collect(list)
            case "FROZENSET":
                self.collect(lambda items: frozenset(map(as_key, items)))
            case "DICT":
                self.collect(lambda items: dict(_pairs(items)))
            case "PROTO" | "FRAME":
                pass
            case _:
                raise UnknownOpcode(name)

    def top(self, count: int) -> list[Any]:
        """Return the last values."""
        if len(self.stack) < count:
            raise IndexError("the pickle takes more than it has put down")
        return self.stack[-count:]

    def items(self) -> list[Any]:
        """Return the values since the last mark, and forget the mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def collect(self, kind: Callable[[list[Any]], Any]) -> None:
        """Make one value of those since the last mark."""
        items = self.items()
        self.stack.append(kind(items))

    def build(self, function: Any, args: tuple[Any, ...]) -> Any:
        """Count what a call copies, and return what it stands for."""
        for arg in args:
            if isinstance(arg, list | tuple | dict | set | frozenset):
                self.budget.spend(len(arg))
            elif isinstance(arg, str | bytes | bytearray):
                self.budget.spend(len(arg) // 1024)
        return build(function, args)

    def fill(self, name: str) -> None:
        """Put values into a list, set or dict; into an object that is not read as into what it would be."""
        if name == "APPEND":
            items = [self.stack.pop()]
        elif name == "SETITEM":
            items = self.top(2)
            del self.stack[-2:]
        else:
            items = self.items()
        kind = dict if name.startswith("SETITEM") else set if name == "ADDITEMS" else list
        target = self.stack[-1]
        if isinstance(target, Unread):
            target.items = kind() if target.items is None else target.items
            target = target.items
        if kind is dict:
            typed(target, dict).update(_pairs(items))
        elif kind is set:
            typed(target, set).update(map(as_key, items))
        else:
            typed(target, list).extend(items)


class Plain:
    """Turns stand-ins into what the caller sees; each object once, so that sharing is free.

    Args:
        tensor: What becomes of a tensor.
        unread: Told of every object that is not read.
    """

    def __init__(self, tensor: Callable[[Tensor], Any], unread: Callable[[Unread], None] = lambda _: None):
        self.tensor, self.unread = tensor, unread
        self.done: dict[int, tuple[Any, Any]] = {}
        self.open: set[int] = set()

    def convert(self, value: Any, depth: int = 0) -> Any:
        """Return a value without stand-ins, but for objects that are not read."""
        if value is None or isinstance(value, str | int | float | bytes):
            return value
        key = id(value)
        if key in self.done:
            return self.done[key][1]
        if key in self.open:
            raise ValueError("an object that contains itself")
        if depth > MOST_DEPTH:
            raise TooMuch(f"values nested at most {MOST_DEPTH} deep")
        if isinstance(value, Unread) and value.items is None:
            # Known before its parts are: configurations hold references to what holds them.
            self.done[key] = (value, value)
            self.unread(value)
            value.args, value.state = self.convert(value.args, depth + 1), self.convert(value.state, depth + 1)
            return value
        self.open.add(key)
        result = self.fresh(value, depth + 1)
        self.open.discard(key)
        # The original is kept beside the result, so that its id is not given to another object.
        self.done[key] = (value, result)
        return result

    def fresh(self, value: Any, depth: int) -> Any:
        """Convert a value for the first time."""
        if isinstance(value, Unread):  # a subclass of a kind of data: its content
            return self.convert(value.items, depth)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, NumpyArray):
            return Unread("numpy array") if value.array is None else value.array
        if isinstance(value, NumpyDtype):
            return Unread("numpy dtype") if value.dtype is None else value.dtype
        if isinstance(value, Global):
            return str(value)
        if isinstance(value, dict):
            return {self.key(key, depth): self.convert(item, depth) for key, item in value.items()}
        if isinstance(value, list):
            return [self.convert(item, depth) for item in value]
        if isinstance(value, tuple):
            return tuple([self.convert(item, depth) for item in value])
        return value

    def key(self, key: Any, depth: int) -> Any:
        """Convert a key; tensors, by which optimizers know their states, stay as they are."""
        return key if isinstance(key, Tensor) else self.convert(key, depth)


def _pairs(items: list[Any]) -> Any:
    return zip(map(as_key, items[::2]), items[1::2], strict=True)
