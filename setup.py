import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fedbiot_trainer" / "__init__.py").read_text()).group(1)
QUALITY = ["mypy>=2.4", "ruff>=0.14"]
DEEPSPEED = ["deepspeed>=0.19", "ninja>=1.11"]
QUANTIZATION = ["bitsandbytes>=0.50", "torchao>=0.17"]
NVFLARE = ["nvflare>=2.9,<2.10"]
TEST = ["hypothesis>=6.100", "pytest>=8.0", "pytest-xdist>=3.6", "tensorboard>=2.14", *DEEPSPEED, *QUANTIZATION]

setup(
    name="fedbiot-trainer",
    version=VERSION,
    description="FedBiOT as a Hugging Face Trainer plugin: federated fine-tuning of LLMs without the full model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords="federated-learning llm fine-tuning lora peft trl transformers privacy",
    license_expression="Apache-2.0",
    packages=find_packages(include=["fedbiot_trainer", "fedbiot_trainer.*"]),
    package_data={"fedbiot_trainer": ["py.typed", "output/templates/*.md", "evaluation/metrics/*/*.py"]},
    python_requires=">=3.11",
    install_requires=[
        "accelerate>=1.10,<2",
        "datasets>=5.2,<6",
        "evaluate>=0.4.6",
        "huggingface_hub>=1.31,<3",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=2.0",
        "packaging>=23.0",
        "peft>=0.19,<1",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.8",
        "torch>=2.9,<3",
        "tqdm>=4.60",
        "transformers>=5.14,<6",
        "trl>=1.9,<2",
        "xxhash>=3.4",
    ],
    extras_require={
        "deepspeed": DEEPSPEED,
        "quantization": QUANTIZATION,
        "nvflare": NVFLARE,
        "lm-eval": ["lm-eval[hf]>=0.4.13,<0.5"],
        "test": TEST,
        "quality": QUALITY,
        "dev": TEST + QUALITY,
    },
    entry_points={"console_scripts": ["fedbiot = fedbiot_trainer.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
