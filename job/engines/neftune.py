"""NEFTune: uniform noise on the embeddings of text, in training mode only.

As in the paper, the noise of a row of L tokens is uniform within ± alpha / sqrt(L · H), with the
hidden size H. Transformers takes the length of the padded batch for L; here it is each row's own,
so that a row's noise is as strong in any micro-batch, padded or packed. As in Transformers, the
noise is added to the output of the embedding layer, so that images, which are put in afterwards,
have none, and it is drawn from the global random generator, which checkpoints restore.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@contextmanager
def noisy_embeddings(model: "PreTrainedModel | PeftModel", alpha: float | None) -> Iterator[None]:
    """A context in which the model adds noise to its embeddings whenever it is in training mode.

    `alpha` is None for no noise. `model` has to be the one that is called: the outermost.
    """
    if alpha is None:
        yield
        return
    noise = _Noise(alpha)
    embeddings = model.get_input_embeddings()
    hooks = (
        model.register_forward_pre_hook(noise.note_rows, with_kwargs=True),
        embeddings.register_forward_hook(noise.add),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Noise:
    """Two hooks: the model's notes the lengths of the rows, the embedding layer's adds the noise.

    Neither syncs with the device. Blocks that recompute their activations get the same embeddings,
    because the embedding layer is in none of them.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._lengths: torch.Tensor | None = None
        """Of each token's row, with the shape of the input ids."""

    def note_rows(
        self, _: torch.nn.Module, __: tuple[object, ...], inputs: Mapping[str, torch.Tensor]
    ) -> None:
        """Takes the arguments of the model's forward pass: those of a packed or padded batch."""
        if "row_cu_seqlens" in inputs:
            lengths = inputs["row_cu_seqlens"].diff()  # (N,)
            tokens = inputs["input_ids"].shape[1]
            self._lengths = lengths.repeat_interleave(lengths, output_size=tokens)[None]  # (1, T)
        else:
            mask = inputs["attention_mask"]  # (B, T)
            self._lengths = mask.sum(dim=1, keepdim=True).expand_as(mask)

    def add(
        self, layer: torch.nn.Module, ids: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """The embeddings (…, T, H) with noise; None leaves them as they are."""
        lengths = self._lengths
        # Some models also embed single tokens, to find the placeholders of images.
        if not layer.training or lengths is None or ids[0].shape != lengths.shape:
            return None
        limits = self._alpha / (lengths * output.shape[-1]).sqrt()  # (…, T)
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * limits[..., None].to(output.dtype)
