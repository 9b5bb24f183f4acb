"""The commands of `nvembed`, put together. What a command needs is imported when it runs."""

from __future__ import annotations

import typer

from nvembed.commands import (
    data,
    doctor,
    embed,
    export,
    jobs,
    plan,
    preflight,
    recipe,
    registry,
    report,
    search,
    submit,
)

app = typer.Typer(
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Embedding models: use and check them.",
)
app.command("embed")(embed.embed_command)
app.command("search")(search.search_command)
app.command("plan")(plan.plan_command)
app.command("export")(export.export_command)
app.command("import")(export.import_command)
app.command("doctor")(doctor.doctor_command)
app.command("report")(report.report_command)
app.command("preflight")(preflight.preflight_command)
app.add_typer(recipe.app, name="recipe")
app.add_typer(data.app, name="data")
app.add_typer(registry.app, name="registry")
app.command("submit")(submit.submit_command)
app.add_typer(jobs.app, name="jobs")
