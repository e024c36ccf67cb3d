"""Method ``auto`` with ``token_intervals``: which quantizers of a unit find an interval for each token at run time."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ptq_tdq.config import Config
from ptq_tdq.intervals.auto import TOKEN
from ptq_tdq.intervals.dynamic_token import DynamicToken
from ptq_tdq.modules import ActivationQuantizer
from ptq_tdq.recon.choice import believed, ratio_db
from ptq_tdq.recon.parts import Parts
from ptq_tdq.recon.streams import UnitCall
from ptq_tdq.recon.unit import Unit

SHARE = 0.05  # of the unit's loss on held-out samples: what a pass over the values at run time has to be worth


def choose_tokens(
    unit: Unit, quantizers: list[ActivationQuantizer], call: UnitCall, target: Parts, config: Config
) -> None:
    """Put the method "dynamic-token" into the records of those for which it pays.

    The quantizers have sources already. One is given intervals of tokens where that alone takes more than ``SHARE`` off
    the loss of the held-out samples, beyond what chance explains, and if all of those together do so too.
    """
    judge = unit.split()[1]

    def losses(chosen: list[ActivationQuantizer]) -> Tensor:
        kept = [quantizer.source for quantizer in chosen]
        for quantizer in chosen:
            quantizer.source = DynamicToken.of(quantizer.qtype).to(unit.device)
        try:
            return judge.losses(call, target, config.activations.loss_power)
        finally:
            for quantizer, source in zip(chosen, kept, strict=True):
                quantizer.source = source

    before = losses([])

    def pays(after: Tensor) -> bool:
        gain = before - after
        return believed(gain) and float(gain.mean()) > SHARE * float(before.mean())

    alone = {q: losses([q]) for q in quantizers if q.along is not None}
    chosen = [q for q, after in alone.items() if pays(after)]
    if chosen and pays(losses(chosen)):
        for quantizer in chosen:
            gain = ratio_db(before, alone[quantizer])
            quantizer.record = replace(quantizer.record, method=TOKEN, gain_db=gain)
