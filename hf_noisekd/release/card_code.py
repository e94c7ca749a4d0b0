"""The code that a card shows: how to load the student and read images with it."""

from hf_noisekd.models import cifar
from hf_noisekd.record.schema import Record
from hf_noisekd.shrinking import shrunk


class CardCode:
    """The code of a card, for a student on the Hub or in the folder that the code is run in."""

    def __init__(self, record: Record, on_batch: bool):
        architecture = record.model.architecture
        self.source = record.repo_id or "."
        self.class_name = architecture if architecture.isidentifier() else "Model"
        self.is_timm = record.model.library == "timm"
        self.image_mode = "L" if (record.model.input_size or [3])[0] == 1 else "RGB"
        self.on_batch = on_batch
        # timm and transformers know the architectures of this package once it is imported.
        registers = self.is_timm and architecture in cifar.default_cfgs | shrunk.default_cfgs
        self._register = [f"import hf_noisekd  # registers {architecture}"] if registers else []
        self.needs_package = on_batch or registers

    def timm(self) -> str:
        """Return the code that answers images with timm."""
        source = "local-dir:." if self.source == "." else f"hf-hub:{self.source}"
        return self._inference(
            ["import timm", "import torch"],
            f'model = timm.create_model("{source}", pretrained=True).eval()',
            "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
            "inputs = torch.stack([transform(image) for image in images])",
            "model(inputs)",
        )

    def transformers(self) -> str:
        """Return the code that answers images with transformers."""
        return self._inference(
            ["import torch", "from transformers import AutoImageProcessor, AutoModelForImageClassification"],
            f'model = AutoModelForImageClassification.from_pretrained("{self.source}").eval()',
            f'processor = AutoImageProcessor.from_pretrained("{self.source}")',
            'inputs = processor(images, return_tensors="pt")',
            "model(**inputs).logits",
        )

    def pipeline(self) -> str:
        """Return the code that answers images with transformers' pipeline."""
        imports = ["from transformers import pipeline"]
        prepare = []
        processor = ""
        if self.image_mode == "L" and self.is_timm:
            imports = [
                "from torchvision.transforms import Grayscale",
                "from transformers import AutoImageProcessor, pipeline",
            ]
            prepare = [
                f'processor = AutoImageProcessor.from_pretrained("{self.source}")',
                "processor.val_transforms.transforms.insert(0, Grayscale())  # a pipeline turns images into RGB",
            ]
            processor = ", image_processor=processor"
        classify = f'classify = pipeline("image-classification", model="{self.source}"{processor})'
        return "\n".join([*imports, *self._register, "", *prepare, classify, "answers = classify(images)"])

    def recalibrate(self) -> str:
        """Return the commands that store other statistics, without data and with."""
        command = f"noisekd recalibrate --model {self.source} --output-dir recalibrated"
        return f"{command} --teacher TEACHER\n{command} --dataset FOLDER_OR_HUB_ID --split train"

    def _inference(self, imports: list[str], load: str, prepare: str, inputs: str, logits: str) -> str:
        own = ["from hf_noisekd import batch_statistics"] if self.on_batch else self._register
        lines = [
            *imports,
            *own,
            "",
            load,
            prepare,
            f'images = [image.convert("{self.image_mode}") for image in images]  # a list of PIL images',
            inputs,
            f"with torch.no_grad(){', batch_statistics(model)' if self.on_batch else ''}:",
            f"    probs = {logits}.softmax(-1)",
        ]
        return "\n".join(lines)
