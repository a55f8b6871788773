//! What `mod multiprocessing` promises: a table of small programs, and what each must print.
//!
//! A program runs in a process of its own, which has a single thread, as the module requires. So
//! there is no `#[test]` here, but a `main` that runs the table (`harness = false` in Cargo.toml).
//!
//! To add a promise, copy one: `announce` prints the error that `join` is to report, and
//! `failed_as_announced` compares the two. `cargo test -- 'a child'` runs the promises with these
//! words in their names.

use std::error::Error;
use std::fs::File;
use std::io::{self, PipeWriter, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{self, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, mem, thread};

use nix::libc;
use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid, getppid};

use demo::multiprocessing::{Process, Queue};

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
        name: "the child runs the target with its argument, and `join` waits for it",
        program: || {
            let run_proc = |parent| {
                thread::sleep(Duration::from_millis(100));
                assert_eq!(getppid(), parent);
                println!("child");
            };
            let mut p = Process::new(run_proc, getpid());
            p.start()?;
            p.join()?;
            println!("parent");
            p.join()
        },
        holds: |run| run.ok && run.output == "child\nparent\n",
    },
    Promise {
        name: "an error of the target is shown, and reported by `join`",
        program: || {
            let fail = |()| {
                announce("exited with status 1");
                Err::<(), _>("on purpose")
            };
            let mut p = Process::new(fail, ());
            p.start()?;
            p.join()
        },
        holds: |run| run.failed_as_announced() && run.errors.starts_with("Error: \"on purpose\"\n"),
    },
    Promise {
        name: "a panic is shown, ends the child alone, and is reported by `join`",
        program: || {
            let _dropped_by_the_parent_alone = PrintsWhenDropped;
            let panic = |()| {
                announce("exited with status 1");
                panic::panic_any(PanicsWhenDropped);
            };
            let mut p = Process::new(panic, ());
            p.start()?;
            p.join()
        },
        holds: |run| {
            let drops = run.errors.matches("dropped").count();
            run.failed_as_announced() && run.errors.contains("panicked") && drops == 1
        },
    },
    Promise {
        name: "a child skips the exit handlers of its parent",
        program: || {
            extern "C" fn handler() {
                println!("exit handler");
            }
            // SAFETY: the handler prints, and no more.
            unsafe { libc::atexit(handler) };
            let mut p = Process::new(|()| (), ());
            p.start()?;
            p.join()
        },
        holds: |run| run.ok && run.output == "exit handler\n",
    },
    Promise {
        name: "a child that exits is reported by `join`",
        program: || {
            let exit = |()| {
                announce("exited with status 3");
                process::exit(3);
            };
            let mut p = Process::new(exit, ());
            p.start()?;
            p.join()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "a child that was killed is reported by `join`",
        program: || {
            let be_killed = |signal: Signal| {
                announce(&format!("was killed by {signal}"));
                signal::raise(signal)
            };
            let mut p = Process::new(be_killed, Signal::SIGTERM);
            p.start()?;
            p.join()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "a child that cannot be waited for is reported by `join`",
        program: || {
            // While SIGCHLD is ignored, a child that ends leaves nothing to wait for.
            // SAFETY: no handler is set.
            unsafe { signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
            let mut p = Process::new(|()| (), ());
            p.start()?;
            p.join()
        },
        holds: |run| !run.ok && run.errors.contains(" cannot be waited for: ECHILD"),
    },
    Promise {
        name: "an unfinished line comes out once, after a panic as well",
        program: || {
            print!("parent, ");
            let panic = |()| {
                print!("child, ");
                panic!("on purpose");
            };
            let mut p = Process::new(panic, ());
            p.start()?;
            let joined = p.join();
            print!("end");
            joined
        },
        holds: |run| !run.ok && run.output == "parent, child, end",
    },
    Promise {
        name: "a child whose output was lost has failed",
        program: || {
            let lose_output = |()| {
                announce("exited with status 1");
                print!("unfinished");
                break_stdout();
            };
            let mut p = Process::new(lose_output, ());
            p.start()?;
            p.join()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "a process is not started when output was lost before",
        program: || {
            print!("unfinished");
            break_stdout();
            let mut p = Process::new(|()| (), ());
            eprintln!("{}", p.start().unwrap_err());
            p.join()
        },
        holds: |run| {
            let not_started = run.errors.contains("can only join a started process");
            !run.ok && run.errors.starts_with("stdout: ") && not_started
        },
    },
    Promise {
        name: "a process that is dropped goes on by itself",
        program: || {
            let outlive = |parent| {
                while getppid() == parent {
                    thread::sleep(Duration::from_millis(1));
                }
                println!("child");
            };
            Process::new(outlive, getpid()).start()
        },
        holds: |run| run.ok && run.output == "child\n",
    },
    Promise {
        name: "signals do not interrupt `join`",
        program: || {
            handle_sigusr1();
            let mut p = Process::new(signal_parent, ());
            p.start()?;
            p.join()
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "a misuse is a panic in Python's words",
        program: || {
            let mut p = Process::new(|()| (), ());
            assert!(panic::catch_unwind(AssertUnwindSafe(|| p.join())).is_err());
            p.start()?;
            assert!(panic::catch_unwind(AssertUnwindSafe(|| p.start())).is_err());
            p.join()
        },
        holds: |run| {
            let join = run.errors.contains("can only join a started process");
            run.ok && join && run.errors.contains("cannot start a process twice")
        },
    },
    Promise {
        name: "a child draws numbers of its own",
        program: || {
            let draw = |()| println!("{}", rand::random::<u64>());
            draw(());
            for _ in 0..2 {
                let mut p = Process::new(draw, ());
                p.start()?;
                p.join()?;
            }
            draw(());
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
        name: "`terminate` ends a child that is stopped",
        program: || {
            let mut p = Process::new(|()| signal::raise(Signal::SIGSTOP), ());
            p.start()?;
            waitpid(None, Some(WaitPidFlag::WUNTRACED))?; // until the child is stopped
            p.terminate()?;
            p.join()
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "`terminate` reports a child that had failed",
        program: || {
            let fail = |write_end: PipeWriter| {
                mem::forget(write_end); // so it is open until the child has ended
                announce("exited with status 1");
                Err::<(), _>("on purpose")
            };
            let (mut read_end, write_end) = io::pipe()?;
            let mut p = Process::new(fail, write_end);
            p.start()?;
            read_end.read_to_end(&mut Vec::new())?;
            p.terminate()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "`terminate` does nothing before the start and after the end",
        program: || {
            let (mut read_end, write_end) = io::pipe()?;
            let mut p = Process::new(|write_end: PipeWriter| mem::forget(write_end), write_end);
            p.terminate()?;
            p.start()?;
            read_end.read_to_end(&mut Vec::new())?;
            p.terminate()?;
            p.terminate()
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "a child that cannot be terminated is reported",
        program: || {
            // While SIGCHLD is ignored, a child that ends leaves nothing to wait for.
            // SAFETY: no handler is set.
            unsafe { signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
            let mut p = Process::new(|()| (), ());
            p.start()?;
            let _ = waitpid(None, None); // until the child has ended
            p.terminate()
        },
        holds: |run| !run.ok && run.errors.contains(" cannot be terminated: ESRCH"),
    },
    Promise {
        name: "a text comes out as it was put, in its turn",
        program: || {
            const TIMES: [usize; 4] = [1, 0, 50_000, 2];
            let put = |q: &Queue| TIMES.iter().try_for_each(|&n| q.put(&"进程\n".repeat(n)));
            let q = Queue::new()?;
            let mut pw = Process::new(put, &q);
            pw.start()?;
            for n in TIMES {
                assert!(q.get()? == "进程\n".repeat(n));
            }
            pw.join()
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "a thousand requests can be put before the replies are taken",
        program: || {
            let answer = |(requests, replies): (&Queue, &Queue)| {
                (0..1_000).try_for_each(|_| replies.put(&requests.get()?))
            };
            let (requests, replies) = (Queue::new()?, Queue::new()?);
            let mut p = Process::new(answer, (&requests, &replies));
            p.start()?;
            for i in 0..1_000 {
                requests.put(&i.to_string())?;
            }
            for i in 0..1_000 {
                assert_eq!(replies.get()?, i.to_string());
            }
            p.join()
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "a child that has put 2,000 texts can be joined before they are taken",
        program: || {
            let put = |q: &Queue| (0..2_000).try_for_each(|i| q.put(&i.to_string()));
            let q = Queue::new()?;
            let mut pw = Process::new(put, &q);
            pw.start()?;
            pw.join()?;
            for i in 0..2_000 {
                assert_eq!(q.get()?, i.to_string());
            }
            Ok(())
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "texts that fit into `PIPE_BUF` can be put by several writers at once",
        program: || {
            fn text(writer: usize, i: usize) -> String {
                let length = libc::PIPE_BUF - size_of::<usize>() - i % 100;
                format!("{:x<length$}", format!("{writer} {i} "))
            }
            let put =
                |(q, writer): (&Queue, usize)| (0..300).try_for_each(|i| q.put(&text(writer, i)));
            let q = Queue::new()?;
            let mut writers = [0, 1, 2, 3].map(|writer| Process::new(put, (&q, writer)));
            for pw in &mut writers {
                pw.start()?;
            }
            let mut next = [0; 4];
            for _ in 0..4 * 300 {
                let value = q.get()?;
                let writer: usize = value[..1].parse()?;
                assert_eq!(value, text(writer, next[writer]));
                next[writer] += 1;
            }
            writers.iter_mut().try_for_each(Process::join)
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "`join` waits until a slow reader has printed all",
        program: || {
            let read = |q: &Queue| -> Result<(), Box<dyn Error>> {
                loop {
                    let value = q.get()?;
                    thread::sleep(Duration::from_millis(50));
                    print!("{value} ");
                }
            };
            let q = Queue::new()?;
            let mut pr = Process::new(read, &q);
            pr.start()?;
            for value in ["A", "B", "C"] {
                q.put(value)?;
            }
            q.join()?;
            pr.terminate()
        },
        holds: |run| run.ok && run.output == "A B C ",
    },
    Promise {
        name: "`put` and `join` fail each time when the reader has ended",
        program: || {
            let q = Queue::new()?;
            let mut pr = Process::new(|q: &Queue| q.get().map(drop), &q);
            pr.start()?;
            q.put("A")?;
            pr.join()?;
            println!("{}", q.put("B").unwrap_err());
            println!("{}", q.put("C").unwrap_err());
            println!("{}", q.join().unwrap_err());
            Ok(())
        },
        holds: |run| run.ok && run.output == "the reader of the queue has ended\n".repeat(3),
    },
    Promise {
        name: "`join` fails when the reader ends meanwhile",
        program: || {
            let q = Queue::new()?;
            let end = |_: &Queue| thread::sleep(Duration::from_millis(100));
            let mut pr = Process::new(end, &q);
            pr.start()?;
            q.join()
        },
        holds: |run| !run.ok && run.errors == "Error: \"the reader of the queue has ended\"\n",
    },
    Promise {
        name: "`get` fails when all writers have ended",
        program: || {
            let q = Queue::new()?;
            let mut pw = Process::new(|q: &Queue| q.put("A"), &q);
            pw.start()?;
            println!("{}", q.get()?);
            q.get().map(drop)
        },
        holds: |run| {
            let error = "Error: \"all writers of the queue have ended\"\n";
            !run.ok && run.output == "A\n" && run.errors == error
        },
    },
    Promise {
        name: "`get` fails when the writer was killed in the middle of a text",
        program: || {
            let q = Queue::new()?;
            let mut pw = Process::new(|q: &Queue| q.put(&"x".repeat(300_000)), &q);
            pw.start()?;
            thread::sleep(Duration::from_millis(100)); // by now it waits for room
            pw.terminate()?;
            q.get().map(drop)
        },
        holds: |run| !run.ok && run.errors == "Error: \"all writers of the queue have ended\"\n",
    },
    Promise {
        name: "a text that is not UTF-8, as it was mixed, is an error",
        program: || {
            // The second writer's length, whose bytes are not UTF-8, is read as a part of the text
            // that the first writer has not finished.
            let put = |q: &Queue| q.put(&"x".repeat(300_000));
            loop {
                let q = Queue::new()?;
                let mut first = Process::new(put, &q);
                first.start()?;
                thread::sleep(Duration::from_millis(50)); // by now it waits for room
                first.terminate()?;
                Process::new(put, &q).start()?;
                q.get()?; // it is no error if the first writer had not begun
            }
        },
        holds: |run| !run.ok && run.errors.contains("Error: \"invalid utf-8 sequence"),
    },
    Promise {
        name: "a process that was killed in `join` leaves its texts to be read",
        program: || {
            let write = |q: &Queue| -> Result<(), Box<dyn Error>> {
                q.put("A")?;
                let mut p = Process::new(|q: &Queue| q.join(), q);
                p.start()?;
                thread::sleep(Duration::from_millis(100)); // by now it waits for the answer
                p.terminate()?;
                q.put("B")
            };
            let q = Queue::new()?;
            let mut pw = Process::new(write, &q);
            pw.start()?;
            pw.join()?;
            println!("{} {}", q.get()?, q.get()?);
            Ok(())
        },
        holds: |run| run.ok && run.output == "A B\n",
    },
    Promise {
        name: "a process is on one side of a queue",
        program: || {
            let q = Queue::new()?;
            let write = |q: &Queue| -> Result<(), Box<dyn Error>> {
                q.put("A")?;
                println!("{}", q.get().unwrap_err());
                q.put("B")
            };
            let mut pw = Process::new(write, &q);
            pw.start()?;
            q.get()?;
            pw.join()?;
            println!("{}", q.put("C").unwrap_err());
            println!("{}", q.join().unwrap_err());
            q.get().map(drop)
        },
        holds: |run| {
            run.ok && run.output == "this process is on the other side of the queue\n".repeat(3)
        },
    },
    Promise {
        name: "signals do not interrupt `get`",
        program: || {
            handle_sigusr1();
            let write = |q: &Queue| {
                signal_parent(());
                q.put("A")
            };
            let q = Queue::new()?;
            let mut pw = Process::new(write, &q);
            pw.start()?;
            println!("{}", q.get()?);
            pw.join()
        },
        holds: |run| run.ok && run.output == "A\n",
    },
    Promise {
        name: "the writer and then the reader end when the parent was killed",
        program: || {
            let write = |(q, parent): (&Queue, Pid)| {
                while getppid() == parent {
                    thread::sleep(Duration::from_millis(1));
                }
                q.put("A")
            };
            let read = |q: &Queue| -> Result<(), Box<dyn Error>> {
                loop {
                    println!("{}", q.get()?);
                }
            };
            let q = Queue::new()?;
            Process::new(write, (&q, getpid())).start()?;
            Process::new(read, &q).start()?;
            signal::raise(Signal::SIGKILL)?;
            Ok(())
        },
        holds: |run| {
            let error = "Error: \"all writers of the queue have ended\"\n";
            !run.ok && run.output == "A\n" && run.errors == error
        },
    },
    Promise {
        name: "an error says that there is no room for a pipe",
        program: || {
            // Each pipe takes two descriptors, the first of which is the lowest that is free.
            let free = File::open("/dev/null")?.as_raw_fd();
            for room in [2, 0] {
                let limit = (free + room).try_into()?;
                let limits = libc::rlimit {
                    rlim_cur: limit,
                    rlim_max: limit,
                };
                // SAFETY: `setrlimit` reads `limits`, and no more.
                unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limits) };
                println!("{}", Queue::new().err().unwrap());
            }
            Ok(())
        },
        holds: |run| run.ok && run.output.matches("pipe: ").count() == 2,
    },
    Promise {
        name: "a reader whose output was lost does not answer `join`",
        program: || {
            let read = |q: &Queue| {
                print!("unfinished");
                break_stdout();
                q.get().map(drop)
            };
            let q = Queue::new()?;
            Process::new(read, &q).start()?;
            q.join()
        },
        holds: |run| {
            let error = "Error: \"the reader of the queue has ended\"\n";
            !run.ok && run.errors.starts_with("Error: \"stdout: ") && run.errors.ends_with(error)
        },
    },
];

impl Run {
    /// Whether the program failed with the error that one of its processes had announced.
    fn failed_as_announced(&self) -> bool {
        let error = format!("Error: \"{}\"\n", self.output.trim_end());
        !self.ok && self.errors.ends_with(&error)
    }
}

/// Prints how this process is going to fail, in the words in which `join` is to report it.
fn announce(failure: &str) {
    println!("process {} {failure}", getpid());
}

/// Handles SIGUSR1, without the flag that resumes what the signal interrupts.
fn handle_sigusr1() {
    extern "C" fn do_nothing(_: i32) {}
    let handler = SigHandler::Handler(do_nothing);
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { signal::sigaction(Signal::SIGUSR1, &action) }.unwrap();
}

fn signal_parent((): ()) {
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(5));
        signal::kill(getppid(), Signal::SIGUSR1).unwrap();
    }
}

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

struct PrintsWhenDropped;

impl Drop for PrintsWhenDropped {
    fn drop(&mut self) {
        eprintln!("dropped");
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
