"""How tests train with Trainer and its kin: a few steps on a CPU, and nothing written or shown."""

from __future__ import annotations

from typing import Any

#: Plain gradient descent, so that a gradient of another size ends elsewhere.
QUIETLY: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
