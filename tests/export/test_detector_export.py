"""torchvision's detectors as ONNX: traced whole, the same boxes, every difference explained."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.ops import MultiScaleRoIAlign, boxes
from torchvision.ops.poolers import LevelMapper

from lightning_n2uq.convert import quantize_model
from lightning_n2uq.export.program import detectors
from lightning_n2uq.export.program.choices import Choices, suppressed
from lightning_n2uq.export.program.explain import explain_file, explain_modules
from lightning_n2uq.export.program.onnx_program import export_program
from lightning_n2uq.export.program.traces import tracing


class Pyramid(nn.Module):
    """Two feature maps, at 1/4 and 1/8 of the image."""

    def __init__(self, width=8):
        super().__init__()
        self.out_channels = width
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.fine = nn.Sequential(nn.Conv2d(8, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        fine = self.fine(self.stem(x))
        return {"0": fine, "1": self.coarse(fine)}


SIZES = {"min_size": 64, "max_size": 64}
ANCHORS = {"sizes": ((8, 12, 16), (24, 32, 40)), "aspect_ratios": ((1.0,),) * 2}


def faster_rcnn():
    pool = MultiScaleRoIAlign(["0", "1"], 3, 2, canonical_scale=16, canonical_level=3)
    return detection.FasterRCNN(
        Pyramid(), 3, rpn_anchor_generator=AnchorGenerator(**ANCHORS), box_roi_pool=pool, box_nms_thresh=0.3,
        **SIZES,
    )  # fmt: skip


def ssd():
    anchors = DefaultBoxGenerator([[2], [2]], min_ratio=20, max_ratio=80)
    backbone = Pyramid()
    backbone.out_channels = [8, 8]
    return detection.ssd.SSD(backbone, anchors, (64, 64), 3)


def retina_net():
    return detection.RetinaNet(Pyramid(), 3, anchor_generator=AnchorGenerator(**ANCHORS), **SIZES)


def fcos():
    one = AnchorGenerator(sizes=((8,), (16,)), aspect_ratios=((1.0,),) * 2)
    return detection.FCOS(Pyramid(32), 3, anchor_generator=one, **SIZES)


BUILDERS = [faster_rcnn, ssd, retina_net, fcos]


def trained(build):
    """Returns a quantized detector with ranges of one batch, and an image; its boxes' scores are apart."""
    torch.manual_seed(0)
    model, images = build(), [torch.rand(3, 64, 64)]
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_logits.weight", "cls_score.weight", "bbox_pred.weight", "bbox_reg.weight")):
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("cls_logits.bias"):
            nn.init.zeros_(parameter)
    quantize_model(model)
    targets = [{"boxes": torch.tensor([[8.0, 9.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]
    with torch.no_grad():
        model.train()(images, targets)
    return model.eval(), images


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda build: build.__name__)
def exported(request):
    model, images = trained(request.param)
    return model, images, export_program(model, images)


def run(file, images):
    session = onnxruntime.InferenceSession(file.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, (image.numpy() for image in images), strict=True)))


@pytest.mark.integration
def test_a_detector_is_one_file_with_boxes_scores_and_labels(exported):
    model, images, program = exported
    found = run(program.model, images)
    assert len(found) == 3
    assert {value.shape[0] for value in found} == {len(found[0])} != {0}
    assert found[0].shape[1:] == (4,)
    assert {node.op_type for node in program.model.graph.node} >= {"NonMaxSuppression", "ConvInteger"}
    if isinstance(model, detection.ssd.SSD):  # no two scores within a rounding: the order is one, too
        with torch.no_grad():
            wanted = model(images)[0].values()
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.integration
def test_differences_are_explained_with_the_decisions_about_boxes(exported):
    model, _, program = exported
    for explanation in (explain_file(program), explain_modules(program, model)):
        assert explanation.ok, explanation.table()
        kinds = {row.name.partition("#")[0] for row in explanation.layers if "detections" in row.name}
        assert kinds == {"detections: comparison", "detections: topk", "detections: suppression"} or (
            isinstance(model, detection.FasterRCNN) and "detections: suppression" in kinds
        )


@pytest.mark.integration
@pytest.mark.parametrize("build", [faster_rcnn, ssd], ids=lambda build: build.__name__)
def test_an_image_without_proposals_and_detections_is_no_error(build):
    model, images = trained(build)
    (model.rpn if build is faster_rcnn else model).score_thresh = 1.5
    program = export_program(model, images)
    assert [value.shape[0] for value in run(program.model, images)] == [0] * 3
    assert explain_file(program).ok


def some_boxes(count, side=50.0):
    torch.manual_seed(0)
    corner = torch.rand(count, 2) * side
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * 20], 1), torch.rand(count)


@pytest.mark.parametrize("count", [0, 1, 40, 900])
def test_suppression_by_class_is_torchvisions(count):
    places, scores = some_boxes(count)
    classes = torch.randint(0, 4, (count,))
    wanted = boxes.batched_nms(places, scores, classes, 0.5)
    assert torch.equal(detectors.batched_nms(places, scores, classes, 0.5), wanted)


def test_boxes_and_regions_are_torchvisions():
    places, _ = some_boxes(60)
    coder = detection._utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    answers, parts = torch.randn(60, 12), [places[:25], places[25:]]
    assert torch.equal(detectors.decode(coder, answers, parts), coder.decode(answers, parts))
    maps = {"0": torch.randn(2, 4, 16, 16), "1": torch.randn(2, 4, 8, 8)}
    pool = MultiScaleRoIAlign(["0", "1"], 3, 2, canonical_scale=16, canonical_level=3)
    wanted = pool(maps, parts, [(64, 64)] * 2)
    assert isinstance(pool.map_levels, LevelMapper)
    found = detectors.pool(list(maps.values()), parts, (3, 3), 2, pool.scales, pool.map_levels)
    assert torch.equal(found, wanted)


def test_torchvision_is_as_before_behind_an_export():
    kept = boxes.batched_nms, detection.ssd.SSD.postprocess_detections
    with detectors.traceable_detectors(nn.Linear(1, 1)):
        assert boxes.batched_nms is kept[0]
    with detectors.traceable_detectors(ssd()):
        assert boxes.batched_nms is detectors.batched_nms
    assert (boxes.batched_nms, detection.ssd.SSD.postprocess_detections) == kept


def margins(decide, forced):
    with tracing(forced={f"detections: {k}": v for k, v in forced.items()}) as trace, Choices():
        found = decide()
    return found, trace.margins


def test_a_forced_decision_is_off_by_its_margin():
    x = torch.tensor([4.0, 1.0, 3.0, 2.999])
    (values, places), off = margins(lambda: x.topk(2), {"topk": torch.tensor([0, 3])})
    assert values.tolist() == pytest.approx([4.0, 2.999])
    assert places.tolist() == [0, 3]
    assert off["detections: topk"] == pytest.approx(0.001 / 4, rel=1e-3)
    passes, off = margins(lambda: x > 2.9999, {"comparison": torch.tensor([True, False, False, False])})
    assert passes.tolist() == [True, False, False, False]
    assert off["detections: comparison"] == pytest.approx(0.0001 / 4, rel=1e-2)


def test_a_suppression_is_judged_by_scores_and_overlaps():
    places = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 5]])
    scores = torch.tensor([0.9, 0.8, 0.5, 0.4])

    def off(*kept):
        def decide():
            return suppressed(places, scores, 0.499, boxes.nms(places, scores, 0.499))

        found, trace = margins(decide, {"suppression": torch.tensor(kept)})
        assert found.tolist() == list(kept)
        return trace["detections: suppression"]

    assert boxes.nms(places, scores, 0.499).tolist() == [0, 2]
    assert off(0, 2) == 0
    assert off(0, 2, 3) == pytest.approx(0.001 * 5 / 30, rel=1e-2)  # overlaps the first by 0.5
    assert off(0, 1, 2) > 0.1  # twice the same object
    assert off(0) > 0.1  # one is missing
    assert off(2, 0) > 0.1  # the wrong order
    assert off(1, 2) > 0.1  # the better one of two is gone
    assert off(0, 2, 3) > 1e-4
