"""ditnorm among the other things that people do to pipelines: features x families x orders, as
tests and as docs/compatibility.md.
"""

import pytest

pytest.register_assert_rewrite(f"{__name__}.matrix", f"{__name__}.compiled")  # so that what fails there shows its numbers
