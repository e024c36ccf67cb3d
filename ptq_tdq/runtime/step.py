"""The intervals of all quantizers at the time step of the call that runs, by one lookup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq_tdq.artifacts import Artifact
from ptq_tdq.errors import ArtifactMismatchError, ConfigError, ModelError
from ptq_tdq.intervals.dynamic import Dynamic, restore_dynamic
from ptq_tdq.records import QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import lookup, present


class Interval(NamedTuple):
    """Scale float32, zero_point int32 of one quantizer: [1] where all rows are alike, else [B], of tokens [B, ...]."""

    scale: Tensor
    zero_point: Tensor

    @property
    def each(self) -> bool:
        """Whether rows have intervals of their own."""
        return self.scale.numel() > 1

    def repeated(self, times: int) -> Interval:
        """For a batch that holds each row so many times, one after the other."""
        if not self.each or times == 1:
            return self
        return Interval(self.scale.repeat_interleave(times), self.zero_point.repeat_interleave(times))


class _Found(NamedTuple):
    """The intervals of all quantizers: [Q] or, where rows have their own, [Q, B]; and each for itself."""

    together: Interval
    apart: list[Interval]


class _Row:
    """One row of the tables, with each quantizer's place in it."""

    def __init__(self, quantizers: int) -> None:
        with torch.inference_mode(False):  # calls outside that mode write to it too
            self.values = torch.empty(2, quantizers, dtype=torch.int32)
            halves = Interval(*_halves(self.values))
            self.places = _Found(halves, list(map(Interval, *(values.split(1) for values in halves))))


class _Call:
    """What belongs to one call of the model: intervals by number of rows, and results that its parts share."""

    def __init__(self) -> None:
        self.token: Token[_Call | None] | None = None
        self.intervals: dict[int, _Found] = {}
        self.row: _Row | None = None
        self.kept: dict[Any, Any] = {}


_present: ContextVar[_Call | None] = ContextVar("the integer model's call that runs now", default=None)


def _call() -> _Call:
    call = _present.get()
    if call is None:
        raise ModelError("A layer ran outside the model's forward pass; call the model, not its parts.")
    return call


def kept() -> dict[Any, Any]:
    """Results that parts of the model share within the call that runs."""
    return _call().kept


class Step:
    """Holds the tables of all quantizers side by side, [T + 1, 2, Q], and says what they are in the present call.

    Those of one layer are neighbours, in its order. Calls in several threads do not see each other.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Raises :class:`ArtifactMismatchError` for a quantizer whose network is not that of its method."""
        self._column: dict[str, int] = {}
        self._dynamic: dict[str, Dynamic] = {}
        timed: list[Tensor] = []
        for quantizer in artifact.quantizers:
            name, table = quantizer.name, artifact.tables[quantizer.name]
            if table.scale is not None:
                self._column[name] = len(timed)
                timed.append(torch.stack([table.scale.view(torch.int32), table.zero_point], 1))
                continue
            zero_point, qtype = table.zero_point.reshape(()), QType(quantizer.bits)
            try:
                length = artifact.time_axis.length
                self._dynamic[name] = restore_dynamic(quantizer.method, zero_point, qtype, table.generator, length)
            except (ConfigError, ModelError) as error:
                raise ArtifactMismatchError(f"The quantizer '{name}' cannot be made: {error}") from error
        self._table = torch.stack(timed, 2) if timed else torch.empty(0, 2, 0, dtype=torch.int32)
        self._free: list[_Row] = []  # to make one takes longer than a lookup

    def __contains__(self, quantizer: str) -> bool:
        """Whether the quantizer has a table (a dynamic one has not)."""
        return quantizer in self._column

    def __getstate__(self) -> dict[str, Any]:
        """A copy has rows of its own."""
        return {**vars(self), "_free": []}

    def by_token(self, quantizer: str) -> bool:
        """Whether the quantizer finds an interval for each token."""
        return quantizer in self._dynamic and self._dynamic[quantizer].by_token

    def columns(self, quantizers: Iterable[QuantizerRecord]) -> range | None:
        """Where :meth:`together` has these quantizers' intervals; None unless all have tables, one beside the other."""
        found = [self._column.get(quantizer.name, -1) for quantizer in quantizers]
        beside = range(found[0], found[0] + len(found)) if found else range(0)
        return beside if min(found, default=-1) >= 0 and found == list(beside) else None

    def together(self, rows: int) -> Interval:
        """The intervals of all quantizers with tables: [Q] or, where rows differ in t, [Q, rows]; both without gaps."""
        return self._intervals(rows).together

    def begin(self, *_: Any) -> None:
        """A call of the model begins: the intervals are looked up once in it, at the t that it has."""
        call = _Call()
        call.token = _present.set(call)

    def end(self, *_: Any) -> None:
        """The call that began last ends, by its result or an error."""
        call = _call()
        assert call.token is not None
        _present.reset(call.token)
        if call.row is not None:
            self._free.append(call.row)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A ``with`` block as one call."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def interval(self, quantizer: str, x: Tensor) -> Interval:
        """The quantizer's interval for its tensor x [B, ..., K], tokens last; only a dynamic one looks at the values.

        Raises :class:`ModelError` outside a call and where the rows of x belong to no sample while samples differ in t.
        """
        dynamic = self._dynamic.get(quantizer)
        if dynamic is None:
            return self._intervals(x.shape[0]).apart[self._column[quantizer]]
        scale, zero_point = dynamic(present(len(x)), x)
        return Interval(scale.contiguous(), zero_point.contiguous())

    def alike(self, rows: int) -> bool:
        """Whether one interval serves so many rows, for each quantizer with a table."""
        return not self._column or not self._intervals(rows).apart[0].each

    def _intervals(self, rows: int) -> _Found:
        call = _call()
        found = call.intervals.get(rows)
        if found is None:
            found = call.intervals[rows] = self._look_up(call, rows)
        return found

    def _look_up(self, call: _Call, rows: int) -> _Found:
        t = present(rows)
        if rows > 1 and t.stride(0) and not bool((t == t[0]).all()):
            together = Interval(*(lookup(values, t).T.contiguous() for values in _halves(self._table)))
            return _Found(together, list(map(Interval, *(each.unbind() for each in together))))
        if call.row is None:
            call.row = self._filled(t[:1])
        return call.row.places

    def _filled(self, t: Tensor) -> _Row:
        """The tables' row at ``t`` [1]."""
        try:
            row = self._free.pop()
        except IndexError:
            row = _Row(len(self._column))
        one = t.item()
        if one == int(one):
            row.values.copy_(self._table[int(one)])
        else:
            for place, values in zip(_halves(row.values), _halves(self._table), strict=True):
                place.copy_(lookup(values, t)[0])
        return row


def _halves(table: Tensor) -> tuple[Tensor, Tensor]:
    """The scales, as float32, and the zero points of [..., 2, Q]: views [..., Q]."""
    return table[..., 0, :].view(torch.float32), table[..., 1, :]
