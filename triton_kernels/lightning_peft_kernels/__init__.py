"""Fused kernels for parameter-efficient fine-tuning: 4-bit weights, LoRA, experts, 8-bit AdamW.

Every op runs on any device. CUDA tensors use Triton if it fits; other tensors use torch. The
package needs torch only: Triton and bitsandbytes are imported when an op uses them.
"""

from lightning_peft_kernels.block_scaled.decode import decode_blocks, decode_blocks_reference
from lightning_peft_kernels.block_scaled.encode import encode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors
from lightning_peft_kernels.block_scaled.linear import block_linear
from lightning_peft_kernels.dispatch import (
    Backend,
    Decision,
    checkpoint_contexts,
    current_backend,
    select,
    triton_available,
    use_backend,
)
from lightning_peft_kernels.dropout.ops import (
    draw_seed,
    dropout,
    seeded_dropout,
    seeded_dropout_reference,
)
from lightning_peft_kernels.experts.grouped_linear import (
    block_grouped_linear,
    grouped_linear,
    grouped_linear_reference,
    nf4_grouped_linear,
)
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.experts.low_rank import add_low_rank, add_low_rank_reference
from lightning_peft_kernels.fp8.linear import fp8_lora_linear
from lightning_peft_kernels.fp8.products import e4m3_scale, select_fp8
from lightning_peft_kernels.lora.linear import lora_linear, lora_linear_reference
from lightning_peft_kernels.nf4.linear import (
    nf4_linear,
    nf4_lora_linear,
    nf4_lora_linear_reference,
)
from lightning_peft_kernels.nf4.ops import (
    dequantize_4bit,
    dequantize_4bit_reference,
    quantize_4bit,
    quantize_4bit_reference,
)
from lightning_peft_kernels.nf4.packed import Packed4bit
from lightning_peft_kernels.nf4.projections import (
    Projection,
    nf4_grouped_projections,
    nf4_grouped_projections_reference,
)
from lightning_peft_kernels.nf4.small_batch import nf4_small_batch, nf4_small_batch_reference
from lightning_peft_kernels.optim.adamw_8bit import pooled_8bit_step as adamw_8bit
from lightning_peft_kernels.optim.adamw_8bit import (
    pooled_8bit_step_reference as adamw_8bit_reference,
)
from lightning_peft_kernels.optim.step_inputs import PooledStep
from lightning_peft_kernels.scale.ops import output_scale, output_scale_reference

__all__ = [
    "Backend",
    "BlockLayout",
    "BlockTensors",
    "Decision",
    "Groups",
    "Packed4bit",
    "PooledStep",
    "Projection",
    "adamw_8bit",
    "adamw_8bit_reference",
    "add_low_rank",
    "add_low_rank_reference",
    "block_grouped_linear",
    "block_linear",
    "checkpoint_contexts",
    "current_backend",
    "decode_blocks",
    "decode_blocks_reference",
    "dequantize_4bit",
    "dequantize_4bit_reference",
    "draw_seed",
    "dropout",
    "e4m3_scale",
    "encode_blocks",
    "fp8_lora_linear",
    "grouped_linear",
    "grouped_linear_reference",
    "lora_linear",
    "lora_linear_reference",
    "nf4_grouped_linear",
    "nf4_grouped_projections",
    "nf4_grouped_projections_reference",
    "nf4_linear",
    "nf4_lora_linear",
    "nf4_lora_linear_reference",
    "nf4_small_batch",
    "nf4_small_batch_reference",
    "output_scale",
    "output_scale_reference",
    "quantize_4bit",
    "quantize_4bit_reference",
    "seeded_dropout",
    "seeded_dropout_reference",
    "select",
    "select_fp8",
    "triton_available",
    "use_backend",
]
