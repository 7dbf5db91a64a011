"""Installation. On Python 3.12 and later, run `pip install --no-deps recbole==1.2.1` first."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "cprec_recbole/__init__.py").read_text()
).group(1)

# What RecBole 1.2.1 asks for, but ray: its ray<=2.6.3 has no file for Python 3.12 and later, so pip
# refuses all of RecBole there. RecBole uses ray for hyper-parameter search only.
RECBOLE_NEEDS = [
    "colorama==0.4.4",  # RecBole's own pins
    "colorlog==4.7.2",
    "plotly>=5.24",  # RecBole: >=4; the page of a comparison needs a newer one
    "psutil>=5.9",
    "scikit-learn>=0.23.2",
    "scipy>=1.6",
    "tabulate>=0.8.10",
    "tensorboard>=2.5",
    "texttable>=0.9",
    "thop>=0.1.1.post2207130030",
    "tqdm>=4.48.2",
]

DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "latex2mathml>=3.77"]
SERVE = ["fastapi>=0.110", "uvicorn>=0.27", "httpx>=0.27", "prometheus-client>=0.20"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.7"]
FAST = ["numba>=0.60", *EXPORT]  # answers in less time; without them torch gives the same

setup(
    name="cprec_recbole",
    version=VERSION,
    description="CpRec for RecBole: small and fast sequential recommenders",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["cprec_recbole", "cprec_recbole.*"]),
    package_data={
        "cprec_recbole": [
            "py.typed",
            "__init__.pyi",
            "compare/settings.yaml",
            "compare/page/*.html",
            "compare/page/*.js",
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "pandas>=2.0",
        "pyyaml>=6.0",
        "rich>=13.0",
        "lazy_loader>=0.4",  # names of the package are imported when they are used
        "safetensors>=0.4",
        "jinja2>=3.0",  # the page of a comparison
        *RECBOLE_NEEDS,
        "recbole==1.2.1; python_version < '3.12'",
    ],
    extras_require={
        "bench": ["faiss-cpu", "matplotlib"],
        "fast": FAST,
        "export": EXPORT,
        "serve": SERVE,  # examples/serve
        "docs": DOCS,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.7",  # `make test` runs files beside each other
            "hypothesis>=6",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "playwright",
            *FAST,
            *SERVE,
            *DOCS,  # the tests build the site
        ],
    },
    entry_points={"console_scripts": ["cprec = cprec_recbole.commands.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
