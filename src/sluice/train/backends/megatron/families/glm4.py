"""GLM-4-0414 and the older GLM-4, without experts (transformers: `modeling_glm4.py`, `modeling_glm.py`).

`glm4` has norms after attention and MLP as well; the older type, `glm`, does not.
"""

from __future__ import annotations

import dataclasses

from sluice.train.backends.megatron.families.base import Family

GLM = Family("glm", qkv_bias="attention_bias", fused_gate_up=True, partial_rotary=True, rotary_interleaved=True)
GLM4 = dataclasses.replace(GLM, model_type="glm4", post_norms=True)
