import pytest
pytestmark = pytest.mark.django_db
def test_x(trainer, inbox):
    a = inbox.propose()
    print(a.status, a.data)
    assert a.status == 201
