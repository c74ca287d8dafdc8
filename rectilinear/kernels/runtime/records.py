"""Records: 64-bit integers with names, in memory, for jitted code, emitted code and plain Python alike.

    @record
    class Rows:
        data: int = 0
        row: int = 0

In Python `Rows` is a dataclass. In jitted code ``Rows(data=place)`` is the same fields on the stack of the function that makes it, passed
by address: reading and assigning fields costs a load and a store. In both, nested records are parts of the record they stand in, and
assigning to one copies it. Returning one from jitted code is an error at compile time, since its memory ends with the function that made
it. Where jitted code wants an address, a record passes for its own. Emitted code finds the fields by `offsets_of`. This is the one place
that lays them out.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform, get_type_hints

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typeconv import Conversion
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, lower_getattr_generic, lower_setattr_generic, models, register_model

WORD = ir.IntType(64)
WORD_BYTES = 8
PAIR_BYTES = 128
"""A pair of cache lines, which the adjacent-line prefetcher of x86 couples: words that different threads write lie in different ones."""

MOST_STORED = 512
"""Bytes of a record up to which it is cleared by stores side by side; a longer one is by a call, which takes less code."""

_Record = TypeVar("_Record")


class Layout(types.Type):  # type: ignore[misc]  # numba is untyped
    """The type of a record in jitted code: offset in bytes and type of each field."""

    def __init__(self, cls: type, fields: dict[str, tuple[int, Any]], size: int) -> None:
        self.fields, self.size = fields, size
        super().__init__(f"{cls.__module__}.{cls.__qualname__}")

    def can_convert_to(self, typingctx: Any, other: Any) -> Any:
        return Conversion.safe if other == types.intp else None


@dataclass_transform()
def record(cls: type[_Record]) -> type[_Record]:
    """Make a record of a class whose fields are all ``int`` or records, with a default each, which is 0 or an empty record."""
    return _record(cls, WORD_BYTES)


@dataclass_transform()
def padded_record(multiple: int) -> Callable[[type[_Record]], type[_Record]]:
    """A `record` whose size is a multiple of so many bytes: those that two cores must not share, for words that several threads write."""
    return lambda cls: _record(cls, multiple)


def _record(cls: type[_Record], multiple: int) -> type[_Record]:
    fields: dict[str, tuple[int, Any]] = {}
    size = 0
    for name, hint in get_type_hints(cls).items():
        kind = types.intp if hint is int else hint.layout
        fields[name] = (size, kind)
        size += WORD_BYTES if hint is int else kind.size
        setattr(cls, name, 0 if hint is int else dataclasses.field(default_factory=hint))
    made: Any = dataclasses.dataclass(cls)
    made.layout = Layout(cls, fields, -(-size // multiple) * multiple)
    made.__setattr__ = _assign
    _make_constructor(made)
    return made  # type: ignore[no-any-return]


def _assign(self: Any, name: str, value: Any) -> None:
    """Assignment in Python, which is to do what it does in jitted code."""
    if name not in self.layout.fields:
        raise AttributeError(f"{type(self).__qualname__!r} has no field {name!r}")
    object.__setattr__(self, name, value if isinstance(value, int) else dataclasses.replace(value))


def bytes_of(cls: type) -> int:
    """What a record takes in memory."""
    return cls.layout.size  # type: ignore[attr-defined,no-any-return]


def offsets_of(cls: type) -> dict[str, int]:
    """Where each integer of a record lies, in bytes, by its name, as in ``"src.row"``."""
    return dict(_offsets(cls.layout, "", 0))  # type: ignore[attr-defined]


def _offsets(layout: Layout, prefix: str, start: int) -> Iterator[tuple[str, int]]:
    for name, (offset, kind) in layout.fields.items():
        if isinstance(kind, Layout):
            yield from _offsets(kind, f"{prefix}{name}.", start + offset)
        else:
            yield prefix + name, start + offset


def words_of(value: Any) -> list[int]:
    """The integers of a record that Python made, in their order in memory."""
    words: list[int] = []
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        words += [part] if isinstance(part, int) else words_of(part)
    return words


if TYPE_CHECKING:

    def at(cls: type[_Record], address: int) -> _Record:
        """The record of class `cls` at `address`, in jitted code."""

    def address_of(value: object) -> int:
        """Where a record lies, in jitted code."""

else:

    @intrinsic
    def at(typingctx, cls, address):
        """The record of class `cls` at `address`."""
        return cls.typing_key.layout(cls, types.intp), lambda context, builder, signature, args: args[1]

    @intrinsic
    def address_of(typingctx, value):
        """Where a record lies."""
        return types.intp(value), lambda context, builder, signature, args: args[0]


# What numba has to be told.


@register_model(Layout)
class _Address(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, layout: Layout) -> None:
        super().__init__(manager, layout, WORD)

    def get_data_type(self) -> Any:
        """As part of something else, such as a tuple."""
        raise TypeError(f"a {self.fe_type} is returned from jitted code, or kept: it ends with the function that made it")

    get_return_type = get_data_type


@lower_cast(Layout, types.intp)  # type: ignore[untyped-decorator]
def _pass_address(context: Any, builder: Any, layout: Any, kind: Any, address: Any) -> Any:
    return address


@infer_getattr
class _Fields(AttributeTemplate):  # type: ignore[misc]
    key = Layout

    def generic_resolve(self, layout: Layout, name: str) -> Any:
        return layout.fields[name][1] if name in layout.fields else None


@lower_getattr_generic(Layout)  # type: ignore[untyped-decorator]
def _get(context: Any, builder: Any, layout: Layout, address: Any, name: str) -> Any:
    offset, kind = layout.fields[name]
    place = builder.add(address, WORD(offset))
    return place if isinstance(kind, Layout) else _load(builder, place)


@lower_setattr_generic(Layout)  # type: ignore[untyped-decorator]
def _set(context: Any, builder: Any, signature: Any, args: Any, name: str) -> None:
    offset, kind = signature.args[0].fields[name]
    _put(builder, builder.add(args[0], WORD(offset)), kind, context.cast(builder, args[1], signature.args[1], kind))


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, WORD.as_pointer())


def _load(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address), align=WORD_BYTES)


def _put(builder: Any, place: Any, kind: Any, value: Any) -> None:
    """Store a word, or copy a record."""
    if isinstance(kind, Layout):
        words = [_load(builder, builder.add(value, WORD(offset))) for offset in range(0, kind.size, WORD_BYTES)]
    else:
        words = [value]
    for index, word in enumerate(words):
        builder.store(word, _pointer(builder, builder.add(place, WORD(index * WORD_BYTES))), align=WORD_BYTES)


def _make_constructor(cls: Any) -> None:
    """Let jitted code call the class, with any of its fields by position or name."""
    layout = cls.layout
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=0) for name in layout.fields]
    pysig = inspect.Signature(parameters)

    class Constructor(AbstractTemplate):  # type: ignore[misc]
        key = cls

        def generic(self, args: Any, kws: Any) -> Any:
            given = pysig.bind(*args, **kws).arguments
            kinds = [kind if name in given else types.Omitted(0) for name, (_, kind) in layout.fields.items()]
            return signature(layout, *kinds).replace(pysig=pysig)

    infer_global(cls, types.Function(Constructor))

    @lower_builtin(cls, types.VarArg(types.Any))  # type: ignore[untyped-decorator]
    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            space = builder.alloca(ir.ArrayType(WORD, layout.size // WORD_BYTES))
        if layout.size > MOST_STORED:
            cgutils.memset(builder, space, WORD(layout.size), 0)
        else:
            builder.store(space.type.pointee(None), space)
        address = builder.ptrtoint(space, WORD)
        for (offset, kind), given, value in zip(layout.fields.values(), signature.args, args, strict=True):
            if not isinstance(given, types.Omitted):
                _put(builder, builder.add(address, WORD(offset)), kind, value)
        return address


@record
class Atomic:
    """A word that threads share: read and written by way of its address only, by `native.load`, `native.store` and their like."""

    value: int = 0
