"""Wan 2.1 and 2.2 (per-token modulation of TI2V-5B included), WanAnimate, VACE, ChronoEdit."""

from torch import Tensor

from ..functional import scale_residual
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from .base import FusedBlock

_SITES = {"norm1": LayerNormScaleShift, "norm2": ScaleResidualNormScaleShift, "norm3": ScaleResidualNormScaleShift}


class WanTransformerBlock(FusedBlock):
    """diffusers' ``WanTransformerBlock``: ``hidden_states`` [B, S, D], ``temb`` [B, 6, D] or per token [B, S, 6, D]."""

    family = "Wan"
    names = frozenset({"WanTransformerBlock"})
    fingerprints = {"forward": frozenset({"1dbab6525f27"})}  # 0.37.0 to 0.42.1, in Wan, WanAnimate and ChronoEdit
    sites = _SITES
    unmodulated = frozenset({"norm2"})
    table = "scale_shift_table"
    site_count = 4

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor) -> Tensor:
        modulation1, gate1, modulation3, gate3 = _modulation(temb, self.scale_shift_table)

        x = self.norm1(hidden_states, **modulation1)
        x = self.attn1(x, None, None, rotary_emb)
        x, hidden_states = self.norm2(hidden_states, x, **gate1)
        x = self.attn2(x, encoder_hidden_states, None, None)
        x, hidden_states = self.norm3(hidden_states, x, **modulation3)
        return scale_residual(hidden_states, self.ffn(x), **gate3, rounding=self.rounding)


class WanVACETransformerBlock(FusedBlock):
    """diffusers' ``WanVACETransformerBlock``: as Wan's on ``control_hidden_states`` [B, S, D], with projections around it."""

    family = "Wan"
    names = frozenset({"WanVACETransformerBlock"})
    fingerprints = {"forward": frozenset({"d95611b95b5d"})}  # 0.37.0 to 0.42.1
    sites = _SITES
    unmodulated = frozenset({"norm2"})
    table = "scale_shift_table"
    site_count = 4

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        control_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
    ) -> tuple[Tensor | None, Tensor]:
        if self.proj_in is not None:
            control_hidden_states = self.proj_in(control_hidden_states) + hidden_states
        modulation1, gate1, modulation3, gate3 = _modulation(temb, self.scale_shift_table.to(temb.device))

        x = self.norm1(control_hidden_states, **modulation1)
        x = self.attn1(x, None, None, rotary_emb)
        x, control_hidden_states = self.norm2(control_hidden_states, x, **gate1)
        x = self.attn2(x, encoder_hidden_states, None, None)
        x, control_hidden_states = self.norm3(control_hidden_states, x, **modulation3)
        control_hidden_states = scale_residual(control_hidden_states, self.ffn(x), **gate3, rounding=self.rounding)

        conditioning_states = None if self.proj_out is None else self.proj_out(control_hidden_states)
        return conditioning_states, control_hidden_states


def _modulation(temb: Tensor, table: Tensor) -> tuple[dict[str, Tensor], ...]:
    """Arguments of norm1, of the gate after attn1, of norm3, of the gate after ffn. All are views: the kernels add the table [1, 6, D]."""
    shift1, scale1, gate1, shift3, scale3, gate3 = temb.unbind(-2)
    shift1_table, scale1_table, gate1_table, shift3_table, scale3_table, gate3_table = table[0].unbind()
    return (
        {"scale": scale1, "shift": shift1, "scale_table": scale1_table, "shift_table": shift1_table},
        {"gate": gate1, "gate_table": gate1_table},
        {"scale": scale3, "shift": shift3, "scale_table": scale3_table, "shift_table": shift3_table},
        {"gate": gate3, "gate_table": gate3_table},
    )
