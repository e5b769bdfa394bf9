"""Pictures in TensorBoard of the last volume of each validation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.figure import Figure
from monai.data import MetaTensor, decollate_batch
from monai.handlers import TensorBoardHandler

from med3dinsight_ext.reports.figures import STYLE, class_colors
from med3dinsight_ext.reports.formatting import short
from med3dinsight_ext.reports.retrieval import gallery, retrieved, slices_of
from med3dinsight_ext.reports.segmentation_figures import add_legend, draw_slices, three_slices


class ValidationPicture(TensorBoardHandler):
    """A handler of a trainer: draws one figure after each validation, under ``tag``.

    Args:
        evaluator: of the validations; None draws nothing.
        log_dir: folder of TensorBoard's files.
    """

    tag: str

    def __init__(self, evaluator: Engine | None, log_dir: str | Path) -> None:
        super().__init__(log_dir=str(log_dir))
        self.evaluator = evaluator

    def attach(self, engine: Engine) -> None:
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        self._writer.add_figure(self.tag, self.draw(engine), engine.state.epoch)
        self._writer.flush()

    @abstractmethod
    def draw(self, engine: Engine) -> Figure:
        """Figure of the evaluator's last batch."""


class OverlayPicture(ValidationPicture):
    """Prediction (filled) and label (outlined) on the image, in three planes.

    The evaluator leaves items with image (1, x, y, z) in [0, 1], and one-hot pred and label.

    Args:
        evaluator: of the validations; None draws nothing.
        log_dir: folder of TensorBoard's files.
        label_names: of the classes, by number; the first is the background.
    """

    tag = "validation/overlay"

    def __init__(
        self, evaluator: Engine | None, log_dir: str | Path, label_names: Sequence[str]
    ) -> None:
        super().__init__(evaluator, log_dir)
        self.label_names = label_names

    def draw(self, engine: Engine) -> Figure:
        item = engine.state.output[-1]
        image: MetaTensor = item["image"][:1].cpu()
        prediction, label = (item[key].argmax(0, keepdim=True).cpu() for key in ("pred", "label"))
        slices = three_slices(prediction, MetaTensor(label.as_tensor(), affine=image.affine))
        colors = class_colors(self.label_names[1:])
        with rc_context(STYLE):
            figure = Figure((7.4, 3.2), layout="constrained")
            (part,) = figure.subfigures(1, 1, squeeze=False)[0]
            name = Path(str(image.meta.get("filename_or_obj", ""))).name
            part.suptitle(short(name, 60), x=0.01, ha="left", fontsize=9.5, weight="bold")
            shown = image.as_tensor().float().clamp(0, 1)
            drawn = draw_slices(part, shown, image.pixdim.tolist(), slices, list(colors.values()))
            add_legend(figure, {k: c for n, (k, c) in enumerate(colors.items(), 1) if n in drawn})
        return figure


class GalleryPicture(ValidationPicture):
    """Four slices of a volume, each with the slices of its plane most similar to its token.

    The evaluator's network is a student, and its batches are of ``SampleTargetsd``.
    """

    tag = "validation/retrieval"

    def draw(self, engine: Engine) -> Figure:
        item = decollate_batch(engine.state.batch, detach=True)[-1]
        tokens = engine.state.output["pred"].tokens
        token = tokens.get("image", tokens.get("joint"))[-1].float().cpu()
        rows = retrieved(token, item["image_target"].cpu(), item["plane"].cpu(), slices_of(item))
        return gallery(rows)
