from tests.conftest import Project


def test_a_message_goes_its_whole_way(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.add.enqueue(1, b=4)
    assert result.wait(timeout=60) == 5
    assert worker.stop() == 0
