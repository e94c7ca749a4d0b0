"""The code that a card shows: how to load the student and read images with it."""

from hf_noisekd.models import cifar
from hf_noisekd.release.record import Record


class CardCode:
    """The code of a card, for a student on the Hub or in the folder that the code is run in.

    Args:
        record: What is known of the student.
        on_batch: Whether it is to be read with batch statistics.
    """

    def __init__(self, record: Record, on_batch: bool):
        self.source = record.repo_id or "."
        self.architecture = record.model.architecture
        self.is_timm = record.model.library == "timm"
        self.image_mode = "L" if (record.model.input_size or [3])[0] == 1 else "RGB"
        self.on_batch = on_batch
        # timm and transformers know the architectures of this package once it is imported.
        self.registers = self.is_timm and self.architecture in cifar.default_cfgs
        self.needs_package = on_batch or self.registers

    def timm(self) -> str:
        """Return the code that answers images with timm."""
        source = "local-dir:." if self.source == "." else f"hf-hub:{self.source}"
        return self._inference(
            ["import timm", "import torch"],
            f'model = timm.create_model("{source}", pretrained=True).eval()',
            "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
            "inputs = torch.stack([transform(image) for image in images])",
            answer="probs = model(inputs).softmax(-1)",
        )

    def transformers(self) -> str:
        """Return the code that answers images with transformers."""
        return self._inference(
            ["import torch", "from transformers import AutoImageProcessor, AutoModelForImageClassification"],
            f'model = AutoModelForImageClassification.from_pretrained("{self.source}").eval()',
            f'processor = AutoImageProcessor.from_pretrained("{self.source}")',
            'inputs = processor(images, return_tensors="pt")',
            answer="probs = model(**inputs).logits.softmax(-1)",
        )

    def pipeline(self) -> str:
        """Return the code that answers images with transformers' pipeline."""
        register = self._register()
        if self.image_mode == "L" and self.is_timm:
            lines = [
                "from torchvision.transforms import Grayscale",
                "from transformers import AutoImageProcessor, pipeline",
                *register,
                "",
                f'processor = AutoImageProcessor.from_pretrained("{self.source}")',
                "processor.val_transforms.transforms.insert(0, Grayscale())  # a pipeline turns images into RGB",
                f'classify = pipeline("image-classification", model="{self.source}", image_processor=processor)',
            ]
        else:
            lines = [
                "from transformers import pipeline",
                *register,
                "",
                f'classify = pipeline("image-classification", model="{self.source}")',
            ]
        return "\n".join([*lines, "answers = classify(images)"])

    def recalibrate(self) -> str:
        """Return the command that stores the statistics of real images."""
        return (
            f"noisekd recalibrate --model {self.source} --dataset FOLDER_OR_HUB_ID --split train "
            "--output-dir recalibrated"
        )

    def _register(self) -> list[str]:
        return [f"import hf_noisekd  # registers {self.architecture}"] if self.registers else []

    def _inference(self, imports: list[str], load: str, prepare: str, inputs: str, *, answer: str) -> str:
        own = ["from hf_noisekd import batch_statistics"] if self.on_batch else self._register()
        context = "torch.no_grad(), batch_statistics(model)" if self.on_batch else "torch.no_grad()"
        return "\n".join(
            [
                *imports,
                *own,
                "",
                load,
                prepare,
                f'images = [image.convert("{self.image_mode}") for image in images]  # a list of PIL images',
                inputs,
                f"with {context}:",
                f"    {answer}",
            ]
        )
