"""x"""


class CloudBackend:
    def __init__(self, t):
        pass
