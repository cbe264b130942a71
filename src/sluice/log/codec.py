"""Records to bytes and back, without loss and without lists of keys.

Encoders and decoders are derived from the type hints of the record classes. A body is one zstd frame:

    uint32 length | JSON | arrays

In the JSON a dataclass is an object by field name, a named tuple is a list, and an array is `[start, n]`:
`n` values from `start` in the stream of its dtype. A stream is all arrays of one dtype end to end, stored
byte plane by byte plane (all first bytes, all second bytes, …): token ids then compress to about half.

`Mapping[str, Any]` fields (metadata, info) take JSON values, tuples, mappings with other keys and numpy
scalars (as Python's); a NaN there keeps no payload, one in an array does. Anything else is refused by
name when it is appended, not lost.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import zstandard
from numpy.typing import NDArray

from sluice.errors import LogError
from sluice.log.records import RECORDS, Kind, Record, keys
from sluice.types import Prompt, SamplingParams

Array: TypeAlias = NDArray[Any]
_LENGTH = struct.Struct("<I")
_LEVEL = 3
"""zstd level. Higher ones cost several times the time for a few percent: log-probs are noise to zstd."""

_SHARED = (Prompt, SamplingParams)
"""Immutable values without arrays that many records hold: all members of a group have one prompt."""
_REMEMBERED = 1_024
"""Newest values of each of these types whose JSON is kept."""


class _UnfitError(ValueError):
    """A value that the log cannot hold; becomes a LogError that names the record."""


class _Out:
    """Arrays on their way out, by dtype."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Array]] = {}
        self.sizes: dict[str, int] = {}

    def put(self, array: Array, dtype: str) -> list[int]:
        start = self.sizes.get(dtype, 0)
        self.parts.setdefault(dtype, []).append(array)
        self.sizes[dtype] = start + len(array)
        return [start, len(array)]


_Encoder: TypeAlias = Callable[[Any, _Out], Any]
_Decoder: TypeAlias = Callable[[Any, Mapping[str, Array]], Any]


class Codec:
    """Encodes and decodes record bodies. Holds zstd contexts: use one per thread."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, record: Record) -> bytes:
        """The body of a record. Raises LogError for a value that cannot be stored without loss."""
        out = _Out()
        try:
            tree = _encoder(type(record))(record, out)
        except _UnfitError as error:
            name = keys(record)[0]
            raise LogError(
                f"the {record.kind} record{f' of {name}' if name else ''} cannot be logged: {error}",
                hint="metadata and info hold plain values: str, int, float, bool, None, list, tuple, dict",
            ) from error
        text = json.dumps([tree, out.sizes], ensure_ascii=False, separators=(",", ":"))
        head = text.encode("utf-8", "surrogatepass")
        streams = (_split(np.concatenate(parts)) for parts in out.parts.values())
        return self._compressor.compress(b"".join((_LENGTH.pack(len(head)), head, *streams)))

    def decode(self, kind: Kind, body: bytes) -> Record:
        """Inverse of `encode`. Raises ValueError for bytes that no `encode` of this Sluice has written."""
        try:
            data = self._decompressor.decompress(body)
            at = _LENGTH.size + _LENGTH.unpack_from(data)[0]
            tree, sizes = json.loads(data[_LENGTH.size : at].decode("utf-8", "surrogatepass"))
            arrays: dict[str, Array] = {}
            for dtype, size in sizes.items():
                end = at + size * np.dtype(dtype).itemsize
                arrays[dtype] = _join(data[at:end], dtype)
                at = end
            return _decoder(RECORDS[kind])(tree, arrays)
        except (zstandard.ZstdError, struct.error, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"a {kind} record does not decode: {error!r}") from error


def _split(array: Array) -> bytes:
    """The bytes of `[n]` values, plane by plane."""
    return array.view(np.uint8).reshape(len(array), array.itemsize).T.tobytes()


def _join(data: bytes, dtype: str) -> Array:
    size = np.dtype(dtype).itemsize
    planes = np.frombuffer(data, np.uint8).reshape(size, len(data) // size)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(-1)


def _scalar(hint: Any) -> type[np.generic] | None:
    """`np.int32` for `NDArray[np.int32]`, None for any other hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is np.ndarray:
        return get_args(arguments[1])[0]
    return arguments[0] if origin is NDArray else None  # numpy 2.5 keeps the alias itself as the origin


def _little_endian(scalar: type[np.generic]) -> str:
    """`<i4` for `np.int32`."""
    return np.dtype(scalar).newbyteorder("<").str


# ── typed fields ────────────────────────────────────────────────────────────────────────────────────────


def _optional(hint: Any) -> Any:
    """X for `X | None`, else None."""
    if get_origin(hint) not in (Union, UnionType):
        return None
    inner = [argument for argument in get_args(hint) if argument is not NoneType]
    if len(inner) != 1 or len(get_args(hint)) != 2:
        raise TypeError(f"the log cannot hold a field of type {hint}")
    return inner[0]


def _named(hint: Any) -> Mapping[str, Any] | None:
    """Field hints of a dataclass or a named tuple, in order; None for any other type."""
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return {field.name: hints[field.name] for field in fields(hint)}
    return get_type_hints(hint) if isinstance(hint, type) and hasattr(hint, "_fields") else None


@cache
def _encoder(hint: Any) -> _Encoder:
    inner = _optional(hint)
    if inner is not None:
        some = _encoder(inner)
        return lambda value, out: None if value is None else some(value, out)
    names = _named(hint)
    if names is not None:
        items = [(name, _encoder(field)) for name, field in names.items()]
        if is_dataclass(hint):
            encoder: _Encoder = lambda value, out: {  # noqa: E731
                name: encode(getattr(value, name), out) for name, encode in items
            }
            return _remembering(encoder) if hint in _SHARED else encoder
        return lambda value, out: [encode(getattr(value, name), out) for name, encode in items]
    origin, arguments = get_origin(hint), get_args(hint)
    scalar = _scalar(hint)
    if scalar is not None:
        return _array_encoder(_little_endian(scalar))
    if origin is tuple and arguments[1:] == (...,):
        each = _encoder(arguments[0])
        return lambda value, out: [each(item, out) for item in value]
    if origin is Mapping and arguments == (str, Any):
        return lambda value, out: _free(value, ())
    if origin is Mapping and arguments == (str, float):
        number = _encoder(float)
        return lambda value, out: {_text(name): number(item, out) for name, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum_encoder(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    raise TypeError(f"the log cannot hold a field of type {hint}")


def _remembering(encode: _Encoder) -> _Encoder:
    """`encode`, once for each of the newest objects: the same object has the same JSON."""
    newest: OrderedDict[int, tuple[Any, Any]] = OrderedDict()  # holding an object keeps its id from coming again

    def remembered(value: Any, out: _Out) -> Any:
        found = newest.get(id(value))
        if found is None:
            found = newest[id(value)] = value, encode(value, out)
            if len(newest) > _REMEMBERED:
                newest.popitem(last=False)
        return found[1]

    return remembered


def _array_encoder(dtype: str) -> _Encoder:
    def encode(value: Any, out: _Out) -> list[int]:
        array = np.asarray(value)
        if array.dtype != dtype or array.ndim != 1:
            raise _UnfitError(
                f"an array of {np.dtype(dtype)} [n] is declared, this is {array.dtype} {list(array.shape)}"
            )
        return out.put(array, dtype)

    return encode


def _enum_encoder(hint: type[Enum]) -> _Encoder:
    def encode(value: Any, _: _Out) -> Any:
        if not isinstance(value, hint):
            raise _UnfitError(f"{value!r} is a {type(value).__name__}, not a {hint.__name__}")
        return value.value

    return encode


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _UnfitError(f"{value!r} is a {type(value).__name__}, not a str")
    return str(value)


def _integer(value: Any, _: _Out) -> int:
    if not isinstance(value, (int, np.integer)):
        raise _UnfitError(f"{value!r} is a {type(value).__name__}, not an int")
    return int(cast(int, value))


def _number(value: Any, _: _Out) -> float:
    if not isinstance(value, (float, int, np.floating, np.integer)):
        raise _UnfitError(f"{value!r} is a {type(value).__name__}, not a float")
    return float(cast(float, value))


_SCALARS: Mapping[Any, _Encoder] = {str: lambda value, _: _text(value), int: _integer, float: _number}


@cache
def _decoder(hint: Any) -> _Decoder:
    inner = _optional(hint)
    if inner is not None:
        some = _decoder(inner)
        return lambda tree, arrays: None if tree is None else some(tree, arrays)
    names = _named(hint)
    if names is not None:
        decoders = {name: _decoder(field) for name, field in names.items()}
        if is_dataclass(hint):
            make = cast("type[Any]", hint)
            return lambda tree, arrays: make(**{name: decoders[name](tree[name], arrays) for name in tree})
        each_field = list(decoders.values())
        return lambda tree, arrays: hint(*(decode(item, arrays) for decode, item in zip(each_field, tree, strict=True)))
    origin, arguments = get_origin(hint), get_args(hint)
    scalar = _scalar(hint)
    if scalar is not None:
        dtype, native = _little_endian(scalar), np.dtype(scalar)
        return lambda tree, arrays: arrays[dtype][tree[0] : tree[0] + tree[1]].astype(native)
    if origin is tuple:
        each = _decoder(arguments[0])
        return lambda tree, arrays: tuple(each(item, arrays) for item in tree)
    if origin is Mapping and arguments == (str, Any):
        return lambda tree, arrays: _unfree(tree)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return lambda tree, arrays: hint(tree)
    return lambda tree, arrays: tree


# ── free values ─────────────────────────────────────────────────────────────────────────────────────────

_TUPLE, _MAP = "$tuple", "$map"


def _free(value: Any, where: tuple[Any, ...]) -> Any:
    """A value of `Mapping[str, Any]` as JSON; what JSON does not know is an object with one `$` key."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, np.generic):
        return _free(value.item(), where)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return {key: _free(item, (*where, key)) for key, item in items}
        return {_MAP: [[_free(key, where), _free(item, (*where, key))] for key, item in items]}
    if isinstance(value, (list, tuple)):
        items = cast("list[Any] | tuple[Any, ...]", value)
        parts = [_free(item, (*where, index)) for index, item in enumerate(items)]
        return parts if isinstance(value, list) else {_TUPLE: parts}
    raise _UnfitError(
        f"{'.'.join(map(str, where)) or 'the value'} is a {type(value).__module__}.{type(value).__name__}"
    )


def _unfree(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_unfree(item) for item in cast("list[Any]", tree)]
    if not isinstance(tree, dict):
        return tree
    pairs = cast("dict[str, Any]", tree)
    if _TUPLE in pairs:
        return tuple(_unfree(item) for item in pairs[_TUPLE])
    if _MAP in pairs:
        return {_unfree(key): _unfree(item) for key, item in pairs[_MAP]}
    return {key: _unfree(item) for key, item in pairs.items()}
