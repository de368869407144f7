"""What a site may tell the owner of a failure, and what an engine lacks."""

import importlib.util


class SiteError(Exception):
    """
    A failure whose message may leave the site: it says what its operator should do, and holds nothing of the data.

    Of any other exception the owner learns the class only; what it says stays in the site's own log.
    """


def check_installed(library: str, extra: str):
    """
    Raises:
        ImportError: If the library of an engine is not installed.
    """
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"This needs {library}, which is not installed: `pip install 'fedbiot-trainer[{extra}]'`.")
