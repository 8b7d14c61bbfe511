"""The configs that come with the package, by name."""

from pathlib import Path

from pipeline.errors import ConfigError, did_you_mean

CONFIGS = Path(__file__).parent / "configs"


def find_config(kind: str, name: str) -> Path:
    """The file of a config: a path, or the name of a shipped one.

    Raises:
        ConfigError: neither (with the nearest shipped name).
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    shipped = {file.stem: file for file in sorted((CONFIGS / kind).glob("*.yaml"))}
    if name not in shipped:
        raise ConfigError(
            f"{name}: neither a file nor a shipped {kind} config{did_you_mean(name, shipped)}"
        )
    return shipped[name]
