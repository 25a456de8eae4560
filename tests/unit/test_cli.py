import pytest

from cm3jax import cli


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    assert all(name in capsys.readouterr().out for name in cli.COMMANDS)


def test_unknown_command_is_refused(capsys):
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_with_an_example(command, capsys):
    try:
        status = cli.main([command, "--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    assert f"cm3 {command}" in capsys.readouterr().out
