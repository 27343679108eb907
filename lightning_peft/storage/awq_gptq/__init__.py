"""AWQ and GPTQ: int4 codes of a transposed weight in int32 words, with zero points per group.

    W[n, k] = (q[k, n] - z[k // group, n]) · s[k // group, n]

    AWQ    qweight [K, N/8]: nibble i of word j is column 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    GPTQ   qweight [K/8, N]: nibble i of word j is input 8 j + i; qzeros [K / group, N/8] in order.
           Format "gptq" stores z - 1, "gptq_v2" stores z. With ``desc_act``, g_idx[k] is the group
           of input k.

After loading, codes are held by rows of W, two per byte; `export` writes the words again. Nothing
of gptqmodel is needed.
"""

from lightning_peft.storage.awq_gptq.awq import AWQStorage
from lightning_peft.storage.awq_gptq.gptq import GPTQ2Storage, GPTQStorage

__all__ = ["AWQStorage", "GPTQ2Storage", "GPTQStorage"]
