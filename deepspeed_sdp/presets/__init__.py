"""Model configurations that come with the package: HuggingFace ``config.json`` files, by name."""

from pathlib import Path

from deepspeed_sdp.errors import ConfigError


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def model_path(name: str, key: str) -> Path:
    """A file or folder of that name, or else the preset.

    Raises:
        ConfigError: there is neither; names ``key``.
    """
    preset = Path(__file__).parent / f"{name}.json"
    path = preset if preset.is_file() and not Path(name).exists() else Path(name)
    if not path.exists():
        raise ConfigError(f"{key}: {name} is no file, folder or preset; presets are {', '.join(preset_names())}")
    return path
