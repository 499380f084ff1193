"""YOLO, the first version: one look at the picture, a grid of cells, and in each some boxes and one class.

Redmon, Divvala, Girshick, Farhadi, "You Only Look Once: Unified, Real-Time Object Detection", CVPR 2016. Two variants,
counted for the 20 classes of Pascal VOC at the default configuration:

- `v1`: the 24 convolutions and 2 full layers of its figure 3: 271,703,550 parameters.
- `fast`: Fast YOLO, 9 convolutions and 3 full layers: 45,089,374 parameters.

The paper's figures, not ours: VOC 2007 mAP 63.4 at 45 pictures a second, and 52.7 at 155 for Fast YOLO, on a Titan X
(its table 1; trained on VOC 2007 and 2012, the convolutions first on ImageNet).

Outputs are float32 [B, S, S, N * 5 + C]: of each cell N boxes `(x, y, w, h, confidence)` and then C class
probabilities, the order of the paper's section 2 (darknet's is another). x and y are the centre's place within the
cell, in cells; w and h are the square roots of the box's sides as shares of the picture, so that equation 3 compares
what the network gives, as in darknet. All are linear: the squares mend a negative side, `candidates` a score.

What the paper leaves open, and what is done here:

1. Fast YOLO: it says "9 instead of 24" convolutions and "fewer filters". The layers are those of darknet's first
   `yolo-tiny.cfg`: six times convolution and pooling (16 to 512 maps), three times 1024 maps, full layers of 256
   (linear), 4096 and the output. darknet's later `yolov1-tiny.cfg` has 8 convolutions and one full layer, its
   `yolov1.cfg` a locally connected layer and 3 boxes a cell, both batch normalisation: neither is the paper's net.
2. Initialisation: He et al. 2015 for the leak; the output layer N(0, 0.01), so that training begins near 0; biases 0.
3. The responsible box (section 2.2) is that of the highest IoU; where no box touches the object, that of the smallest
   distance between (x, y, w, h) as shares of the picture; the first of equals. So darknet. The confidence's target is
   its IoU (section 2), through which no gradient flows.
4. Two objects in one cell: the first in the order given is learnt, the others are left out. darknet takes the first of
   an order drawn anew each time, and leaves out objects thinner than 0.005 of the picture, which are kept here.
5. Objects whose centre lies outside the picture belong to the nearest cell of its edge; x and y then exceed it.
6. The loss is equation 3, a mean over images. darknet's gradient is half of it: its rate r and decay d are r / 2 and
   2 d here.

Left to training: the paper trains the first 20 convolutions (here `network.backbone`; of `fast` the 7 that darknet's
reference classifier has, the paper does not say) for about a week on ImageNet at 224 pixels, to 88 % top-5, then adds
the other layers and doubles the size. Here all layers are fresh; no classifier of the house has these layers. Then
about 135 epochs on VOC in batches of 64, momentum 0.9, decay 0.0005, the rate raised from 1e-3 to 1e-2 in the first
ones, 1e-2 for 75 epochs, 1e-3 for 30, 1e-4 for 30 (section 2.2).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision import ops

from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ModelError
from pipeline.models._detector import Candidates, Detector, DetectorConfig, Selection
from pipeline.types import DetectorSpec, Fit

STRIDE = 64  # pixels of the input behind one cell of the last map
INPUT = DetectorSpec(fit=Fit(way="stretch", size_hw=(448, 448)), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
BOTTLENECK = 256  # of Fast YOLO's first full layer


class Layer(NamedTuple):
    """One convolution, and whether it is followed by a 2x2 max pooling."""

    maps: int
    size: int = 3
    stride: int = 1
    pool: bool = False


V1 = (
    Layer(64, 7, stride=2, pool=True),
    Layer(192, pool=True),
    *(Layer(128, 1), Layer(256), Layer(256, 1), Layer(512, pool=True)),
    *((Layer(256, 1), Layer(512)) * 4),
    *(Layer(512, 1), Layer(1024, pool=True)),
    *((Layer(512, 1), Layer(1024)) * 2),
    *(Layer(1024), Layer(1024, stride=2), Layer(1024), Layer(1024)),
)
FAST = (*(Layer(maps, pool=True) for maps in (16, 32, 64, 128, 256, 512)), *((Layer(1024),) * 3))


class Config(DetectorConfig):
    """YOLO v1.

    Attributes:
        variant: `v1` or `fast`, see the module.
        grid: S, cells along each side of the picture.
        boxes_per_cell: N, boxes that each cell proposes.
        dropout: before the output layer.
        leaky: slope of the hidden layers below 0.
        coord_weight: of the errors of centres and sizes.
        no_object_weight: of the confidence of boxes that are responsible for nothing.
        fc_features: width of the last hidden full layer.
        input: of one size, its sides multiples of 64; the full layers are made for it. Default: stretched to 448x448,
            values 0..1.
        select: as darknet evaluates.
    """

    name: Literal["yolo"] = "yolo"
    variant: Literal["v1", "fast"] = "v1"
    grid: int = Field(default=7, ge=1)
    boxes_per_cell: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    leaky: float = Field(default=0.1, ge=0, lt=1)
    coord_weight: float = Field(default=5.0, ge=0)
    no_object_weight: float = Field(default=0.5, ge=0)
    fc_features: int = Field(default=4096, ge=1)
    input: DetectorSpec = INPUT
    select: Selection = Selection(score_threshold=0.001, iou_threshold=0.5)

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        fit = self.input.fit
        if fit.way == "resize":
            raise ValueError("yolo needs pictures of one size: set input.fit.way to stretch or letterbox, got resize")
        if any(side % STRIDE for side in fit.size_hw):
            raise ValueError(
                f"yolo halves pictures six times and needs sides that are multiples of {STRIDE}, got input.fit.size_hw "
                f"{fit.size_hw}; the paper's is 448x448"
            )
        return self

    @property
    def outputs_per_cell(self) -> int:
        """Numbers that the network gives for each cell."""
        return self.boxes_per_cell * 5 + self.num_classes


class Assigned(NamedTuple):
    """The K objects of a batch that are learnt, no two of them in one cell.

    Attributes:
        cells: int64 [K], among the B * S * S cells of the batch, row by row.
        boxes: float32 [K, 4], as the network gives them: (x, y, root of w, root of h).
        labels: int64 [K].
    """

    cells: Tensor
    boxes: Tensor
    labels: Tensor


class Yolo(Detector):
    """YOLO v1: `network` takes normalised float32 [B, C, H, W] to [B, S * S * (N * 5 + C)]."""

    def __init__(self, config: Config, network: nn.Module) -> None:
        super().__init__(config, network)
        self.grid = config.grid
        self.boxes_per_cell = config.boxes_per_cell
        self.coord_weight = config.coord_weight
        self.no_object_weight = config.no_object_weight

    def forward(self, batch: Batch) -> Tensor:
        """Return the predictions [B, S, S, N * 5 + C], see the module.

        Raises:
            ModelError: the images are not of the size and channels that the specification names.
        """
        expected = (self.spec.num_channels, *self.spec.fit.size_hw)
        if tuple(batch.images.shape[1:]) != expected:
            raise ModelError(f"expected images [B, {', '.join(map(str, expected))}], got {list(batch.images.shape)}")
        raw = self.network(self.normalized(batch))
        return cast(Tensor, raw.view(len(raw), self.grid, self.grid, -1))

    def loss(self, outputs: Tensor, targets: BoxTargets) -> dict[str, Tensor]:
        """The terms of equation 3 (section 2.2), each with its weight, summed over an image and averaged over images.

        `centre` and `size` compare boxes, `object` and `no_object` confidences, `class` class probabilities.
        """
        boxes, classes = (part.flatten(0, 2) for part in self._parts(outputs))
        truth = self._assigned(targets)
        mine = boxes[truth.cells]
        iou, chosen = _responsible(mine[..., :4].detach(), truth.boxes, self.grid)
        mine = mine[torch.arange(len(chosen), device=chosen.device), chosen]
        idle = torch.ones_like(boxes[..., 4]).index_put((truth.cells, chosen), boxes.new_zeros(()))
        errors = (mine[:, :4] - truth.boxes).square()
        one_hot = F.one_hot(truth.labels, classes.shape[1])
        sums = {
            "centre": self.coord_weight * errors[:, :2].sum(),
            "size": self.coord_weight * errors[:, 2:].sum(),
            "object": (mine[:, 4] - iou).square().sum(),
            "no_object": self.no_object_weight * (boxes[..., 4].square() * idle).sum(),
            "class": (classes[truth.cells] - one_hot).square().sum(),
        }
        return {name: value / len(outputs) for name, value in sums.items()}

    def candidates(self, outputs: Tensor) -> list[Candidates]:
        """Every box of every cell: [S * S * N, 4] and scores [S * S * N, C], row by row.

        A score is class probability times confidence (equation 1). Both are taken as 0 where they are negative (of two
        negative ones, darknet's product looks like an object), their product as 1 where it is greater.
        """
        boxes, classes = self._parts(outputs)
        along = torch.arange(self.grid, device=boxes.device)
        corners = torch.stack(torch.meshgrid(along, along, indexing="xy"), dim=-1)[:, :, None]
        centres, sides = (boxes[..., :2] + corners) / self.grid, boxes[..., 2:4].square()
        shares = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)
        pixels = shares * shares.new_tensor(self._size_wh() * 2)
        scores = boxes[..., 4:].clamp(min=0) * classes.clamp(min=0)[..., None, :]
        pairs = zip(pixels.flatten(1, 3), scores.clamp(max=1).flatten(1, 3), strict=True)
        return [Candidates(*pair) for pair in pairs]

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [B, S, S, N, 5] and class probabilities [B, S, S, C], in fp32."""
        boxes, classes = outputs.float().tensor_split((self.boxes_per_cell * 5,), dim=-1)
        return boxes.reshape(*boxes.shape[:-1], self.boxes_per_cell, 5), classes

    def _assigned(self, targets: BoxTargets) -> Assigned:
        shares = targets.boxes_xyxy.float() / targets.boxes_xyxy.new_tensor(self._size_wh() * 2)
        lower, upper = shares[:, :2], shares[:, 2:]
        centres = (lower + upper) / 2 * self.grid
        places = centres.floor().long().clamp(0, self.grid - 1)
        cells = (targets.of_image * self.grid + places[:, 1]) * self.grid + places[:, 0]
        boxes = torch.cat([centres - places, (upper - lower).clamp(min=0).sqrt()], dim=1)
        first = _first_of_each(cells, targets.num_images * self.grid**2)
        return Assigned(cells[first], boxes[first], targets.labels[first])

    def _size_wh(self) -> tuple[int, int]:
        height, width = self.spec.fit.size_hw
        return width, height


def build(config: Config) -> Yolo:
    """A freshly initialised YOLO."""
    layers, num_pretrained = (V1, 20) if config.variant == "v1" else (FAST, 7)
    channels = len(config.input.mean)
    full = _full_layers(config, layers[-1].maps)
    parts = {
        "backbone": nn.Sequential(*_convolutions(layers[:num_pretrained], channels, config.leaky)),
        "added": nn.Sequential(
            *_convolutions(layers[num_pretrained:], layers[num_pretrained - 1].maps, config.leaky),
        ),
        "flatten": nn.Flatten(),
        "full": full,
    }
    network = nn.Sequential(OrderedDict(parts))
    _initialise(network, config.leaky)
    model = Yolo(config, network)
    model.heads = (f"network.full.{len(full) - 1}",)
    return model


def _convolutions(layers: Iterable[Layer], channels: int, leaky: float) -> Iterator[nn.Module]:
    for layer in layers:
        yield nn.Conv2d(channels, layer.maps, layer.size, layer.stride, padding=layer.size // 2)
        yield nn.LeakyReLU(leaky)
        if layer.pool:
            yield nn.MaxPool2d(2)
        channels = layer.maps


def _full_layers(config: Config, maps: int) -> nn.Sequential:
    height, width = config.input.fit.size_hw
    features = maps * (height // STRIDE) * (width // STRIDE)
    layers: list[nn.Module] = []
    if config.variant == "fast":
        layers.append(nn.Linear(features, BOTTLENECK))
        features = BOTTLENECK
    return nn.Sequential(
        *layers,
        nn.Linear(features, config.fc_features),
        nn.LeakyReLU(config.leaky),
        nn.Dropout(config.dropout),
        nn.Linear(config.fc_features, config.grid**2 * config.outputs_per_cell),
    )


def _initialise(network: nn.Module, leaky: float) -> None:
    weighted = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in weighted:
        nn.init.kaiming_normal_(layer.weight, a=leaky, nonlinearity="leaky_relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    nn.init.normal_(weighted[-1].weight, std=0.01)


def _first_of_each(cells: Tensor, num_cells: int) -> Tensor:
    """Bool [N]: whether none before it has the same cell."""
    order = torch.arange(len(cells), device=cells.device)
    first = cells.new_full((num_cells,), len(cells)).scatter_reduce(0, cells, order, "amin")
    return first[cells] == order


def _responsible(boxes: Tensor, truth: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Which of the N boxes [K, N, 4] of a cell answers for its object [K, 4]: its IoU [K] and its place [K]."""
    mine, wanted = _shares(boxes, grid), _shares(truth, grid)[:, None]
    iou = ops.box_iou(mine, wanted, fmt="cxcywh")[..., 0].nan_to_num(0)  # 0 / 0 where neither has an area
    distance = (mine - wanted).square().sum(dim=2)
    chosen = torch.where((iou > 0).any(dim=1, keepdim=True), iou, -distance).argmax(dim=1)
    return iou.gather(1, chosen[:, None])[:, 0], chosen


def _shares(boxes: Tensor, grid: int) -> Tensor:
    """Outputs (x, y, root of w, root of h) as shares of the picture, from the corner of the cell."""
    return torch.cat([boxes[..., :2] / grid, boxes[..., 2:].square()], dim=-1)
