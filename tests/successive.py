"""Programs of a rank that follow each other in one process, as tests have them that share ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from autopar.runtime.executor import RankExecutor


class SuccessiveExecutor(RankExecutor):
    """Ends the process groups of the program before, which all ranks have left by then.

    gloo's thread of a group wakes a hundred times a second for as long as the group lives: with those of a dozen
    programs an idle rank takes four per cent of a core.
    """

    before: SuccessiveExecutor | None = None

    def __init__(self, rank: int, world_size: int, payload: Any) -> None:
        before, SuccessiveExecutor.before = SuccessiveExecutor.before, None
        if before is not None:
            before.end()
        super().__init__(rank, world_size, payload)
        SuccessiveExecutor.before = self

    def end(self) -> None:
        groups = [group for _, group in self.groups.values() if group is not None]
        self.release()
        for group in groups:
            dist.destroy_process_group(group)
