"""The trunk and its heads, in torch alone. Rows lie end to end along `T`; there is no batch axis and no padding."""
