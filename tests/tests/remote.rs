//! flashctl against another machine's daemon: the gateway passes on what asks a model, and nothing that changes the machine.

use std::{
    io::{BufRead, BufReader, Read},
    process::{ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result};
use flash_proto::v1;
use flash_tests::{
    DEADLINE,
    daemon::{Client, Gateway, Home, Process, finish},
    tiny_model::{Spec, TinyModel},
};
use rustix::process::Signal;
use tonic::{Code, transport::Endpoint};

/// A machine with a daemon and a gateway, and one with neither.
struct Machines {
    there: Home,
    gateway: Gateway,
    here: Home,
}

impl Machines {
    fn new(gateway: &[&str]) -> Result<Self> {
        let (there, here) = (Home::new()?, Home::new()?);
        TinyModel::generate(Spec::default()).write(&there.models().join("tiny"))?;
        let gateway = there.gateway(gateway)?;
        Ok(Self { there, gateway, here })
    }

    fn ctl(&self, args: &[&str]) -> Command {
        let mut command = self.here.command("flashctl");
        command.args(args).args(["--host", &self.gateway.address]).env("FLASH_API_KEY", "sesame");
        command
    }
}

#[test]
fn another_machines_daemon_answers_as_it_does_there() -> Result<()> {
    let machines = Machines::new(&["--api-key", "sesame"])?;
    let ask = ["run", "tiny", "Hello", "-t", "0", "-n", "12"];
    let down = finish(machines.ctl(&ask), None)?;
    assert_eq!(down.code, Some(69), "{down:?}");
    assert!(down.stderr.contains("flashd is not answering"), "{down:?}");

    let _daemon = machines.there.daemon(&[])?;
    let alone = machines.there.ctl(&ask)?;
    let answer = finish(machines.ctl(&ask), None)?;
    assert_eq!((answer.code, &answer.stdout), (Some(0), &alone.stdout), "{answer:?}");
    let mut by_environment = machines.here.command("flashctl");
    by_environment.args(ask).env("FLASH_HOST", &machines.gateway.address).env("FLASH_API_KEY", "sesame");
    assert_eq!(finish(by_environment, None)?.stdout, alone.stdout);
    for (args, said) in [
        (&["models"][..], "tiny"),
        (&["show", "tiny"], "experts"),
        (&["tokenize", "tiny", "Hello"], " "),
        (&["ps"], "ready"),
        (&["stats", "--json"], "\"finished\":3"),
    ] {
        let told = finish(machines.ctl(args), None)?;
        assert_eq!(told.code, Some(0), "{args:?} {told:?}");
        assert!(told.stdout.contains(said), "{args:?} {told:?}");
    }

    let mut guess = machines.ctl(&ask);
    guess.env("FLASH_API_KEY", "guess");
    let wrong = finish(guess, None)?;
    assert_eq!(wrong.code, Some(77), "{wrong:?}");
    assert!(wrong.stderr.contains("API key"), "{wrong:?}");
    let settings = finish(machines.ctl(&["run", "tiny", "Hello", "--memory", "1GiB"]), None)?;
    assert_eq!(settings.code, Some(64), "{settings:?}");
    assert!(!machines.here.socket().exists(), "nothing is started here");
    Ok(())
}

#[test]
fn what_changes_the_machine_is_for_its_own_user() -> Result<()> {
    let machines = Machines::new(&[])?;
    let _daemon = machines.there.daemon(&[])?;
    let address = format!("http://{}", machines.gateway.address);
    tokio::runtime::Runtime::new()?.block_on(async {
        let client = Client::over(Endpoint::from_shared(address)?.connect().await?);
        let mut models = client.models.clone();
        let removed = models.remove(v1::RemoveRequest { model: "tiny".into() }).await;
        assert_eq!(removed.err().map(|status| status.code()), Some(Code::PermissionDenied));
        let cleared = client.admin.clone().clear_cache(v1::ClearCacheRequest {}).await;
        assert_eq!(cleared.err().map(|status| status.code()), Some(Code::PermissionDenied));
        let capped = models.load(v1::LoadRequest { model: "tiny".into(), memory: Some("1GiB".into()), ..Default::default() }).await;
        assert_eq!(capped.err().map(|status| status.code()), Some(Code::InvalidArgument));
        // A path is the daemon's, which would take it from its own user.
        let path = machines.there.path().join("elsewhere");
        TinyModel::generate(Spec::default()).write(&path)?;
        let path = path.display().to_string();
        let loaded = models.load(v1::LoadRequest { model: path.clone(), ..Default::default() }).await;
        assert_eq!(loaded.err().map(|status| status.message().contains("does not exist")), Some(true));
        assert!(models.show(v1::ShowRequest { model: path }).await.is_err());
        models.load(v1::LoadRequest { model: "tiny".into(), ..Default::default() }).await?;
        anyhow::Ok(())
    })?;
    assert!(machines.there.models().join("tiny").exists());
    Ok(())
}

/// A command that has begun to write, and what it writes.
fn begun(machines: &Machines, args: &[&str]) -> Result<(Process, ChildStdout)> {
    let stderr = machines.here.path().join(format!("{}.stderr", args[0]));
    let mut command = machines.ctl(args);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(std::fs::File::create(&stderr)?);
    let mut process = Process::adopt(command.spawn()?, stderr);
    let mut stdout = process.child().stdout.take().context("a pipe")?;
    stdout.read_exact(&mut [0; 16])?;
    Ok((process, stdout))
}

#[test]
fn an_interrupt_ends_the_answer_there() -> Result<()> {
    let machines = Machines::new(&["--api-key", "sesame"])?;
    let daemon = machines.there.daemon(&[])?;
    let (mut process, _stdout) = begun(&machines, &["run", "tiny", "Hello", "-t", "0"])?;
    let (mut watch, mut seen) = begun(&machines, &["stats", "--json", "--watch", "0.1"])?;
    process.signal(Signal::INT)?;
    assert_eq!(process.code()?, Some(130), "{}", process.errors());
    tokio::runtime::Runtime::new()?.block_on(async {
        let cancelled =
            |snapshot: &v1::Snapshot| snapshot.requests.is_some_and(|requests| requests.cancelled == 1 && requests.running == 0);
        daemon.client().await?.wait_stats("it is cancelled", DEADLINE, cancelled).await
    })?;
    let mut lines = BufReader::new(&mut seen).lines();
    while !lines.next().context("a line")??.contains("\"cancelled\":1") {}
    watch.signal(Signal::INT)?;
    assert_eq!(watch.code()?, Some(130), "{}", watch.errors());
    Ok(())
}

#[test]
fn a_connection_that_breaks_is_told() -> Result<()> {
    let machines = Machines::new(&["--api-key", "sesame"])?;
    let _daemon = machines.there.daemon(&[])?;
    let (mut process, mut stdout) = begun(&machines, &["run", "tiny", "Hello", "-t", "0"])?;
    machines.gateway.process.signal(Signal::KILL)?;
    std::io::copy(&mut stdout, &mut std::io::sink())?;
    assert_eq!(process.code()?, Some(69), "{}", process.errors());
    assert!(process.errors().contains("broke"), "{}", process.errors());
    Ok(())
}
