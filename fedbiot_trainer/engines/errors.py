"""What a site may tell the owner of a failure."""


class SiteError(Exception):
    """
    A failure whose message may leave the site: it says what its operator should do, and holds nothing of the data.

    Of any other exception the owner learns the class only; what it says stays in the site's own log.
    """
