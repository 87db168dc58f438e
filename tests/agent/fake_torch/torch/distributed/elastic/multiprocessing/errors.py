class ChildFailedError(Exception):
    def __init__(self, failures):
        super().__init__("failed")
        self.failures = {}
