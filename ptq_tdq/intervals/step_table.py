"""``step-table``: one interval per observed step, found by min-max, EMA or MSE and not learned (TFMQ-DM)."""

from ptq_tdq.intervals.table import TableSource


class StepTable(TableSource):
    """The table of the observed steps' own best intervals."""

    pattern = "step-table"
