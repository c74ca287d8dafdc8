"""The errors that rectilinear raises on purpose; each is also the built-in error that fits, so old handlers still catch it."""


class BackendError(RuntimeError):
    """The backend asked for is unknown or cannot work here; the text lists every backend, and what to do about it."""


class ShapeError(ValueError):
    """Shapes that do not fit together; the text names the function, the arguments, and the shapes met and wanted."""


class DTypeError(TypeError):
    """A dtype that rectilinear does not compute in, or dtypes that do not promote to a common one."""
