"""Fine-tuning with Lightning: the groups in `configure_optimizers`, the penalty in the step."""

import lightning
import torch
import torchvision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import spem


class Classifier(lightning.LightningModule):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=10)
        spem.attach(self.model, attention)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        images, labels = batch
        task = F.cross_entropy(self.model(images), labels)
        self.log("loss", task, on_step=False, on_epoch=True)
        return task + 0.1 * spem.penalty(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = spem.param_groups(self.model, lr=0.05, weight_decay=1e-4)
        return torch.optim.SGD(groups, momentum=0.9)

    def on_train_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["loss"])
        print(f"epoch {self.current_epoch}: loss {loss:.3f}")


lightning.seed_everything(0, verbose=False)
digits = spem.data.load_images("digits", "train", size=32)
data = TensorDataset(digits.images[:256] / 127.5 - 1, digits.labels[:256])
trainer = lightning.Trainer(
    max_epochs=3,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(
    Classifier("spem(pool=mix(parametrization=anchored))"),
    DataLoader(data, batch_size=64, shuffle=True),
)
