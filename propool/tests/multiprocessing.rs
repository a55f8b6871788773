//! What `mod multiprocessing` promises: a table of small programs, and what each must print.
//!
//! A program runs in a process of its own, which has a single thread, as the module requires. So
//! there is no `#[test]` here, but a `main` that runs the table (`harness = false` in Cargo.toml).
//!
//! To add a promise, copy one: `announce` prints the error that `join` is to report, and
//! `failed_as_announced` compares the two. `cargo test -- 'a worker'` runs the promises with these
//! words in their names.

use std::error::Error;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{self, Command, Stdio};
use std::sync::{LazyLock, mpsc};
use std::time::Duration;
use std::{env, panic, thread};

use nix::libc;
use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, fork, getpid, getppid};

use demo::multiprocessing::Pool;

// The module is in a program, which a test can only include; its `main` is not used.
#[path = "../src/main.rs"]
#[allow(dead_code)]
mod demo;

struct Promise {
    name: &'static str,
    program: fn() -> Result<(), Box<dyn Error>>,
    holds: fn(&Run) -> bool,
}

/// How a program has ended.
#[derive(Debug)]
struct Run {
    ok: bool, // whether its exit status was 0
    output: String,
    errors: String,
}

const PROMISES: &[Promise] = &[
    Promise {
        name: "each task is done once, however many are queued",
        program: || {
            let mut p = Pool::new(4)?;
            for i in 0..20_000 {
                p.apply_async(|i| println!("{i}"), i)?;
            }
            p.close();
            p.join()
        },
        holds: |run| {
            let mut done: Vec<usize> = run.output.lines().flat_map(str::parse).collect();
            done.sort();
            run.ok && done.into_iter().eq(0..20_000)
        },
    },
    Promise {
        name: "a worker that is free takes the next task",
        program: || {
            LazyLock::force(&GATE); // before the fork, so that all have the same pipe
            let mut p = Pool::new(2)?;
            p.apply_async(|_| (&GATE.0).read_exact(&mut [0]).unwrap(), 0)?;
            for i in 1..10 {
                p.apply_async(|i| println!("{i}"), i)?;
            }
            p.apply_async(|_| (&GATE.1).write_all(&[0]).unwrap(), 0)?;
            p.close();
            p.join()
        },
        holds: |run| run.ok && run.output == "1\n2\n3\n4\n5\n6\n7\n8\n9\n",
    },
    Promise {
        name: "each worker that failed is named, and the others do the rest",
        program: || {
            let mut p = Pool::new(4)?;
            let be_killed = |_| {
                announce("was killed by SIGKILL");
                signal::raise(Signal::SIGKILL).unwrap();
            };
            let exit = |_| {
                announce("exited with status 3");
                process::exit(3);
            };
            p.apply_async(be_killed, 0)?;
            p.apply_async(exit, 0)?;
            p.apply_async(be_killed, 0)?;
            for i in 0..50 {
                p.apply_async(|_| println!("done"), i)?;
            }
            p.close();
            p.join()
        },
        holds: |run| {
            let (done, failed): (Vec<_>, Vec<_>) = run.output.lines().partition(|&l| l == "done");
            let named = failed.iter().all(|failure| run.errors.contains(failure));
            !run.ok && done.len() == 50 && failed.len() == 3 && named
        },
    },
    Promise {
        name: "a panic ends its task, is shown and reported, and its worker goes on",
        program: || {
            let mut p = Pool::new(1)?;
            p.apply_async(|_| panic::panic_any(PanicsWhenDropped), 0)?;
            p.apply_async(|_| panic!("on purpose"), 0)?;
            p.apply_async(|_| announce("exited with status 1"), 0)?;
            p.close();
            p.join()
        },
        holds: |run| run.failed_as_announced() && run.errors.contains("on purpose"),
    },
    Promise {
        name: "an unfinished line comes out once, after a panic as well",
        program: || {
            print!("parent, ");
            let mut p = Pool::new(1)?;
            let task = |_| {
                print!("task, ");
                panic!("on purpose");
            };
            p.apply_async(task, 0)?;
            p.close();
            let joined = p.join();
            print!("end");
            joined
        },
        holds: |run| !run.ok && run.output == "parent, task, end",
    },
    Promise {
        name: "a worker that ends without being told to stop has failed",
        program: || {
            LazyLock::force(&GATE); // before the fork, so that all have the same pipe
            let mut p = Pool::new(1)?;
            // The worker then reads end-of-file, and none of the tasks 1 to 3.
            let lay_dev_null_over_the_pipe = |_| {
                (&GATE.0).read_exact(&mut [0]).unwrap();
                announce("exited with status 1");
                let null = File::open("/dev/null").unwrap();
                for fd in 3..null.as_raw_fd() {
                    // SAFETY: `dup2` leaves each of these descriptors open.
                    unsafe { libc::dup2(null.as_raw_fd(), fd) };
                }
            };
            p.apply_async(lay_dev_null_over_the_pipe, 0)?;
            for i in 1..4 {
                p.apply_async(|i| println!("{i}"), i)?;
            }
            p.close();
            (&GATE.1).write_all(&[0])?;
            p.join()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "a worker skips the exit handlers of its parent",
        program: || {
            extern "C" fn handler() {
                println!("exit handler");
            }
            // SAFETY: the handler prints, and no more.
            unsafe { libc::atexit(handler) };
            let mut p = Pool::new(1)?;
            p.close();
            p.join()
        },
        holds: |run| run.ok && run.output == "exit handler\n",
    },
    Promise {
        name: "a process that a task has forked takes no task",
        program: || {
            let mut p = Pool::new(1)?;
            // SAFETY: a worker has a single thread.
            p.apply_async(|_| assert!(unsafe { fork() }.is_ok()), 0)?;
            for i in 1..40 {
                p.apply_async(|i| println!("{i} for {}", getppid()), i)?;
            }
            p.close();
            p.join()?;
            println!("all for {}", getpid());
            Ok(())
        },
        holds: |run| {
            let parent = run.output.trim_end().rsplit(' ').next().unwrap_or_default();
            let done = (1..40).map(|i| format!("{i} for {parent}\n"));
            run.ok && run.output == done.collect::<String>() + &format!("all for {parent}\n")
        },
    },
    Promise {
        name: "a pool can be joined while a later one lives",
        program: || {
            let mut first = Pool::new(2)?;
            let mut second = Pool::new(2)?;
            first.close();
            first.join()?;
            println!("first");
            second.apply_async(|_| println!("second"), 0)?;
            second.close();
            second.join()
        },
        holds: |run| run.ok && run.output == "first\nsecond\n",
    },
    Promise {
        name: "no task is begun when the parent has been killed",
        program: || {
            LazyLock::force(&GATE); // before the fork, so that all have the same pipe
            let mut p = Pool::new(1)?;
            let kill_the_parent = |_| {
                (&GATE.0).read_exact(&mut [0]).unwrap();
                let parent = getppid();
                signal::kill(parent, Signal::SIGKILL).unwrap();
                while getppid() == parent {}
            };
            p.apply_async(kill_the_parent, 0)?;
            p.apply_async(|_| println!("begun"), 0)?;
            p.close();
            (&GATE.1).write_all(&[0])?;
            p.join()
        },
        holds: |run| !run.ok && run.output.is_empty() && run.errors.is_empty(),
    },
    Promise {
        name: "the workers of a pool that is dropped end",
        program: || {
            drop(Pool::new(4)?);
            while let Ok(WaitStatus::Exited(_, status)) = wait() {
                println!("{status}");
            }
            Ok(())
        },
        holds: |run| run.ok && run.output == "1\n1\n1\n1\n" && run.errors.is_empty(),
    },
    Promise {
        name: "a worker draws numbers of its own",
        program: || {
            println!("{}", rand::random::<u64>());
            let mut pools = [Pool::new(1)?, Pool::new(1)?];
            for p in &mut pools {
                p.apply_async(|_| println!("{}", rand::random::<u64>()), 0)?;
                p.close();
                p.join()?;
            }
            println!("{}", rand::random::<u64>());
            Ok(())
        },
        holds: |run| {
            let mut numbers: Vec<&str> = run.output.lines().collect();
            numbers.sort();
            numbers.dedup();
            run.ok && numbers.len() == 4
        },
    },
    Promise {
        name: "signals interrupt neither the parent nor a worker",
        program: || {
            extern "C" fn do_nothing(_: i32) {}
            let handler = SigHandler::Handler(do_nothing);
            let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
            // SAFETY: the handler does nothing.
            unsafe { signal::sigaction(Signal::SIGUSR1, &action) }?;
            let mut p = Pool::new(2)?;
            let signal_all = |_| {
                for _ in 0..20 {
                    thread::sleep(Duration::from_millis(5));
                    signal::kill(Pid::from_raw(0), Signal::SIGUSR1).unwrap();
                }
            };
            p.apply_async(signal_all, 0)?;
            p.close();
            p.join()
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "when no worker is left, a task cannot be queued, and `join` says why",
        program: || {
            let mut p = Pool::new(1)?;
            let die = |_| {
                announce("was killed by SIGKILL");
                signal::raise(Signal::SIGKILL).unwrap();
            };
            p.apply_async(die, 0)?;
            while p.apply_async(|_| (), 0).is_ok() {}
            println!("{}", p.apply_async(|_| (), 0).unwrap_err());
            p.close();
            p.join()
        },
        holds: |run| {
            let (failure, refusal) = run.output.split_once('\n').unwrap_or_default();
            let joined = run.errors == format!("Error: \"{failure}\"\n");
            !run.ok && refusal == "no worker is left\n" && joined
        },
    },
    Promise {
        name: "a misuse is an error in Python's words",
        program: || {
            println!("{}", Pool::new(0).err().unwrap());
            let mut p = Pool::new(1)?;
            println!("{}", p.join().unwrap_err());
            p.close();
            println!("{}", p.apply_async(|_| (), 0).unwrap_err());
            p.join()?;
            p.close();
            p.join()
        },
        holds: |run| {
            let words = "Number of processes must be at least 1\n\
                Pool is still running\n\
                Pool not running\n";
            run.ok && run.output == words
        },
    },
    Promise {
        name: "an error says that there is no room for a pipe",
        program: || {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: `setrlimit` reads `none`, and no more.
            unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &none) };
            Pool::new(1).map(drop)
        },
        holds: |run| !run.ok && run.errors.starts_with("Error: \"pipe: "),
    },
    Promise {
        name: "an error says that output was lost before the workers started",
        program: || {
            print!("unfinished");
            break_stdout();
            Pool::new(1).map(drop)
        },
        holds: |run| !run.ok && run.errors.starts_with("Error: \"stdout: "),
    },
    Promise {
        name: "a worker whose output was lost has failed",
        program: || {
            let mut p = Pool::new(1)?;
            let lose_output = |_| {
                announce("exited with status 1");
                print!("unfinished");
                break_stdout();
            };
            p.apply_async(lose_output, 0)?;
            p.close();
            p.join()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "a worker that cannot be waited for has failed",
        program: || {
            // While SIGCHLD is ignored, a child that ends leaves nothing to wait for.
            // SAFETY: no handler is set.
            unsafe { signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
            let mut p = Pool::new(1)?;
            p.close();
            p.join()
        },
        holds: |run| !run.ok && run.errors.contains(" cannot be waited for: ECHILD"),
    },
];

impl Run {
    /// Whether the program failed with the error that one of its processes had announced.
    fn failed_as_announced(&self) -> bool {
        let error = format!("Error: \"{}\"\n", self.output.trim_end());
        !self.ok && self.errors.ends_with(&error)
    }
}

/// Prints how this worker is going to fail, in the words in which `join` is to report it.
fn announce(failure: &str) {
    println!("worker {} {failure}", getpid());
}

/// A pipe by which one process of a program lets another one wait.
static GATE: LazyLock<(PipeReader, PipeWriter)> = LazyLock::new(|| io::pipe().unwrap());

/// Replaces standard output by a pipe that nobody reads.
fn break_stdout() {
    let (_, write_end) = io::pipe().unwrap();
    // SAFETY: std uses standard output by its number alone.
    unsafe { libc::dup2(write_end.as_raw_fd(), libc::STDOUT_FILENO) };
}

/// Something that must not be dropped.
struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

/// Runs the promises whose names contain one of the arguments, or all if there are none.
///
/// `cargo nextest run` first asks for the names (`--list`), and then runs each one (`--exact`).
fn main() -> Result<(), Box<dyn Error>> {
    let (mut flags, mut words, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--program" => return (named(&args.next().unwrap_or_default())?.program)(),
            "--skip" => skipped.extend(args.next()),
            "--color" | "--format" | "--test-threads" => drop(args.next()), // a value is no name
            flag if flag.starts_with('-') => flags.push(arg),
            _ => words.push(arg),
        }
    }
    let flagged = |flag: &str| flags.iter().any(|f| f == flag);
    let mut chosen: Vec<&Promise> = PROMISES.iter().collect();
    if flagged("--exact") && !words.is_empty() {
        chosen = words
            .iter()
            .map(|name| named(name))
            .collect::<Result<_, _>>()?;
    } else if !words.is_empty() {
        chosen.retain(|promise| words.iter().any(|word| promise.name.contains(word)));
    }
    chosen.retain(|promise| !skipped.iter().any(|word| promise.name.contains(word)));

    if flagged("--ignored") {
        chosen.clear(); // none is
    }
    if flagged("--list") {
        for promise in &chosen {
            println!("{}: test", promise.name);
        }
        return Ok(());
    }
    let mut broken = 0;
    for promise in &chosen {
        let ended = run(promise.name);
        if ended.as_ref().is_ok_and(promise.holds) {
            println!("test {} ... ok", promise.name);
        } else {
            println!("test {} ... FAILED: {ended:#?}", promise.name);
            broken += 1;
        }
    }
    println!("{} passed, {broken} failed", chosen.len() - broken);
    if broken > 0 {
        return Err("not all promises hold".into());
    }
    Ok(())
}

fn named(name: &str) -> Result<&'static Promise, Box<dyn Error>> {
    let promise = PROMISES.iter().find(|p| p.name == name);
    promise.ok_or_else(|| format!("there is no promise named '{name}'").into())
}

/// Runs the program of a promise until all its processes have ended, for ten seconds at most.
fn run(name: &str) -> Result<Run, Box<dyn Error>> {
    let program = Command::new(env::current_exe()?)
        .args(["--program", name])
        .env("RUST_BACKTRACE", "0")
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let group = Pid::from_raw(program.id().try_into()?);
    let (sender, receiver) = mpsc::channel();
    // All processes of the program hold the pipes, and so the output ends when none is left.
    thread::spawn(move || sender.send(program.wait_with_output()));
    let Ok(ended) = receiver.recv_timeout(Duration::from_secs(10)) else {
        signal::killpg(group, Signal::SIGKILL)?;
        return Err("not over after ten seconds".into());
    };
    let ended = ended?;
    Ok(Run {
        ok: ended.status.success(),
        output: String::from_utf8_lossy(&ended.stdout).into(),
        errors: String::from_utf8_lossy(&ended.stderr).into(),
    })
}
