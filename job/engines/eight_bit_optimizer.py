"""bitsandbytes' optimizers without a device sync after each parameter."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MODULE = "bitsandbytes.optim.optimizer"


def avoid_syncs(optimizer: "torch.optim.Optimizer") -> None:
    """Makes the updates of all parameters run behind each other without the host waiting for each.

    bitsandbytes syncs after every parameter, which only paged states need: an adapter of 900 small
    matrices then takes longer to update than to train. Does nothing for other optimizers.
    """
    module = sys.modules.get(MODULE)  # imported if its optimizer was built
    if module is None or not isinstance(optimizer, module.Optimizer8bit):
        return
    if not getattr(optimizer, "is_paged", False) and hasattr(module, "sync_gpu"):
        vars(module)["sync_gpu"] = lambda _: None
