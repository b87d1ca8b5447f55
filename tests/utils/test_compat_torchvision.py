"""One test for every private name of torchvision, as `test_compat.py` has for others."""

import torch
from torch import nn
from torchvision import models
from torchvision.models import detection
from torchvision.ops import MultiScaleRoIAlign

from lightning_n2uq.utils import compat_torchvision as compat


def test_detectors_are_known_by_their_module():  # torchvision 0.29
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert compat.is_detector(model)
    assert compat.is_detector(nn.Sequential(model))
    assert not compat.is_detector(models.resnet18(weights=None))


def test_the_box_coder_decodes_what_it_encodes():  # torchvision 0.29
    coder, boxes = compat.box_coder()((1.0, 1.0, 1.0, 1.0)), torch.tensor([[1.0, 2.0, 5.0, 9.0]])
    answers = torch.cat(coder.encode([boxes + 1], [boxes]))
    torch.testing.assert_close(coder.decode(answers, [boxes])[:, 0], boxes + 1)
    torch.testing.assert_close(coder.decode_single(answers, boxes), boxes + 1)


def test_regions_are_pooled_by_one_function(monkeypatch):  # torchvision 0.29
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([[2.0, 2.0, 9.0, 9.0]])]
    regions = compat.regions_of_boxes(boxes)
    assert regions.tolist() == [[0, 0, 0, 8, 8], [1, 2, 2, 9, 9]]
    assert callable(compat.pool_regions())
    seen = []
    monkeypatch.setattr(f"{compat.POOLERS}.{compat.POOL}", lambda *arguments: seen.append(arguments))
    MultiScaleRoIAlign(["0"], 2, 2)({"0": torch.zeros(2, 1, 4, 4)}, boxes, [(16, 16)] * 2)
    ((maps, given, size, ratio, scales, _),) = seen
    assert (len(maps), given, size, ratio, scales) == (1, boxes, (2, 2), 2, [0.25])
