"""BatchNorms of other classes than PyTorch's own."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def split_norms(model: nn.Module) -> nn.Module:
    """Replace each BatchNorm that carries an activation (timm's ``BatchNormAct2d``) by a plain one and what follows it.

    Args:
        model: Changed in place, and returned.
    """
    for name, module in list(model.named_modules()):
        after = [part for key in ("drop", "act") if isinstance(part := getattr(module, key, None), nn.Module)]
        if not isinstance(module, nn.BatchNorm2d) or is_plain_norm(module) or module.running_mean is None:
            continue
        if name and len(after) == 2:
            norm = nn.BatchNorm2d(module.num_features, module.eps, affine=module.affine)
            norm.load_state_dict({key: value for key, value in module.state_dict().items() if "." not in key})
            model.set_submodule(name, nn.Sequential(norm, *after).train(module.training))
    return model


def is_plain_norm(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm that does what its class is known for, by statistics of its own."""
    known = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None
    return known and type(module).forward is _BatchNorm.forward
