//! Runs the demo from outside, and holds it against the tutorial's 三、进程池.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, iter};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
#[cfg(target_os = "linux")]
use {nix::libc, nix::sys::signal::kill, std::io::Write, std::os::fd::AsRawFd};

/// What the demo says of its tasks: which worker ran each, and for how many seconds.
#[derive(Default)]
struct Tasks {
    workers: HashMap<String, String>,
    seconds: HashMap<String, f64>,
}

impl Tasks {
    /// Asserts that `lines`, but for the parent's, tell of each task once, and that each worker
    /// ends a task before it takes another.
    fn of(lines: &[String]) -> Tasks {
        let mut tasks = Tasks::default();
        let mut busy = HashMap::new();
        for line in lines {
            let words: Vec<_> = line.split([' ', '(', ')']).collect();
            match words[..] {
                ["Run", "task", task, "", worker, "..."] => {
                    let earlier = busy.insert(worker.to_string(), task.to_string());
                    assert!(
                        earlier.is_none(),
                        "worker {worker} had not ended its task: {lines:?}"
                    );
                    let earlier = tasks.workers.insert(task.to_string(), worker.to_string());
                    assert!(earlier.is_none(), "task {task} is run twice: {lines:?}");
                }
                ["Task", task, "runs", seconds, "seconds."] => {
                    let worker = tasks
                        .workers
                        .get(task)
                        .expect("a task ends before it is run");
                    assert_eq!(busy.remove(worker).as_deref(), Some(task), "{lines:?}");
                    tasks
                        .seconds
                        .insert(task.to_string(), seconds.parse().unwrap());
                    assert_eq!(
                        seconds.split('.').nth(1).unwrap().len(),
                        2,
                        "not %.2f: {line}"
                    );
                }
                _ => panic!("a line that is not the tutorial's: {line}"),
            }
        }
        tasks
    }
}

#[test]
fn five_tasks_are_done_once_each_by_processes() {
    let run = Run::start("exec \"$0\"");
    let parent = run.pid();
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
    assert_done(end.lines, parent);
}

#[test]
fn each_line_goes_to_a_file_once() {
    let run = Run::start("exec \"$0\" > \"$OUT\"");
    let parent = run.pid();
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
    let lines = fs::read_to_string(OUT).unwrap();
    assert_done(lines.lines().map(String::from).collect(), parent);
}

/// Asserts that the parent's lines are at their places, and all tasks done in other processes.
fn assert_done(mut lines: Vec<String>, parent: Pid) {
    assert_eq!(lines.remove(0), format!("Parent process {parent}."));
    assert_eq!(lines.pop().unwrap(), "All subprocesses done.");
    let waiting = lines
        .iter()
        .position(|line| line == "Waiting for all subprocesses done...");
    lines.remove(waiting.expect("the parent says that it waits"));
    let tasks = Tasks::of(&lines);
    let mut names: Vec<_> = tasks.seconds.keys().collect();
    names.sort();
    assert_eq!(names, ["0", "1", "2", "3", "4"], "tasks done");
    let parent = parent.to_string();
    assert!(
        tasks.workers.values().all(|worker| *worker != parent),
        "a task ran in the parent"
    );
}

#[test]
fn the_times_slept_are_random() {
    let runs: Vec<_> = (0..8).map(|_| Run::start("exec \"$0\"")).collect();
    let mut seconds: Vec<f64> = Vec::new();
    for run in runs {
        let mut lines = run.end().lines;
        lines.retain(|line| line.contains("task") || line.starts_with("Task"));
        seconds.extend(Tasks::of(&lines).seconds.values());
    }
    assert_eq!(seconds.len(), 40);
    // Forty numbers from [0, 3) lie within a third of it once in 10^17 times.
    let spread = seconds.iter().fold(0.0, |a: f64, b| a.max(*b))
        - seconds.iter().fold(f64::MAX, |a: f64, b| a.min(*b));
    assert!(spread > 1.0, "not uniform on [0, 3): {seconds:?}");
}

#[test]
#[cfg(target_os = "linux")]
fn there_are_four_workers_before_any_task_has_ended() {
    let (run, workers) = Run::held(ROOM);
    assert_eq!(workers.len(), 4, "workers");
    assert!(run.end().status.success());
}

/// Whichever of the workers is held in its task, the others do all the rest meanwhile. Tasks that
/// were dealt out beforehand would wait for it.
#[test]
#[cfg(target_os = "linux")]
fn a_task_goes_to_a_worker_that_is_free() {
    let runs = (0..4).map(|held| {
        let (run, workers) = Run::held(ROOM);
        stop(workers[held]);
        (run, workers[held])
    });
    for (mut run, held) in runs.collect::<Vec<_>>() {
        let mut lines: Vec<String> = Vec::new();
        while lines.iter().filter(|line| line.starts_with("Task")).count() < 4 {
            lines.push(run.line().expect("four tasks end while one worker is held"));
        }
        assert!(
            !lines.iter().any(|line| line.contains(&format!("({held})"))),
            "{lines:?}"
        );
        kill(held, Signal::SIGCONT).unwrap();
        let end = run.end();
        assert!(end.status.success(), "{end:?}");
    }
}

/// A task that has ended before it is stopped shows nothing, so there are three attempts to stop at
/// least one of four; if the time was not measured, none will do.
#[test]
#[cfg(target_os = "linux")]
fn the_time_of_a_task_is_measured() {
    let mut attempts = (0..3).map(|_| {
        let (mut run, workers) = Run::held(ROOM);
        let mut lines: Vec<String> = Vec::new();
        while lines.iter().filter(|line| line.starts_with("Run")).count() < 4 {
            lines.push(run.line().unwrap());
        }
        for &worker in &workers {
            while state(worker) == 'R' {
                thread::sleep(Duration::from_millis(1)); // it has not begun to sleep yet
            }
            stop(worker);
        }
        thread::sleep(Duration::from_millis(3500)); // longer than any of them can sleep
        killpg(run.pid(), Signal::SIGCONT).unwrap();
        lines.extend(run.end().lines);
        lines.retain(|line| line.contains("task") || line.starts_with("Task"));
        Tasks::of(&lines).seconds
    });
    let measured = attempts.any(|seconds| seconds.values().any(|seconds| *seconds >= 3.5));
    assert!(measured, "no task that was stopped is as long as that");
}

#[test]
#[cfg(target_os = "linux")]
fn a_worker_that_was_killed_is_reported_and_the_others_go_on() {
    for signal in [Signal::SIGKILL, Signal::SIGABRT] {
        let (run, workers) = Run::held(ROOM);
        kill(workers[1], signal).unwrap();
        let mut end = run.end();
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        assert_eq!(
            end.errors,
            format!("Error: worker {} was killed by {signal}\n", workers[1])
        );
        assert!(
            !end.lines.contains(&"All subprocesses done.".to_string()),
            "{end:?}"
        );
        end.lines
            .retain(|line| line.contains("task") || line.starts_with("Task"));
        assert!(
            Tasks::of(&end.lines).seconds.len() >= 4,
            "the others run the other tasks: {end:?}"
        );
    }
}

#[test]
#[cfg(target_os = "linux")]
fn all_workers_that_were_killed_are_reported() {
    let (run, workers) = Run::held(ROOM);
    for &worker in &workers {
        kill(worker, Signal::SIGKILL).unwrap();
    }
    let end = run.end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    let killed = workers
        .iter()
        .map(|worker| format!("worker {worker} was killed by SIGKILL"));
    let error = format!("Error: {}\n", killed.collect::<Vec<_>>().join(", "));
    assert_eq!(end.errors, error);
}

/// The output is closed once the parent has no more to print, so that every task panics.
#[test]
#[cfg(target_os = "linux")]
fn a_worker_outlives_a_task_that_panics() {
    let (mut run, workers) = Run::held(ROOM);
    for &worker in &workers {
        stop(worker);
    }
    while run.line().expect("the parent's line") != "Waiting for all subprocesses done..." {}
    run.close();
    killpg(run.pid(), Signal::SIGCONT).unwrap();
    let end = run.end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    assert_eq!(
        end.errors.matches("panicked").count(),
        5,
        "panics of five tasks: {end:?}"
    );
    assert!(
        end.errors.ends_with("\nError: 5 of 5 tasks failed\n"),
        "{end:?}"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn the_workers_end_when_the_parent_was_killed() {
    let (run, _) = Run::held(ROOM);
    run.kill_parent();
    let end = run.end();
    assert_eq!(end.errors, "", "they end quietly");
    let begun = end
        .lines
        .iter()
        .filter(|line| line.starts_with("Run"))
        .count();
    assert!(begun <= 4, "nobody takes the fifth task: {end:?}");
}

#[test]
#[cfg(target_os = "linux")]
fn the_workers_end_when_the_parent_cannot_print() {
    let (mut run, workers) = Run::held(ROOM);
    for &worker in &workers {
        stop(worker); // so that they end only if they are killed
    }
    run.close();
    let end = run.end();
    assert_eq!(end.status.code(), Some(101), "{end:?}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_no_success() {
    let end = Run::start("exec \"$0\" > /dev/full").end();
    assert!(!end.status.success(), "{end:?}");
}

/// Enough for the parent's first line, and too little for another one after it.
#[cfg(target_os = "linux")]
const ROOM: u64 = 24;

/// A file for a run's output, which its shell knows as `$OUT`.
const OUT: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/propool-output");

/// Only ends a run that hangs: no result depends on it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Held to start a run, and to close an output: a run that is being started has copies of the
/// outputs of all others, until its shell runs.
static START: Mutex<()> = Mutex::new(());

/// A run of the demo, in a process group of its own; one that hangs is killed and fails its test.
struct Run {
    parent: Child,
    output: Option<BufReader<ChildStdout>>,
    over: Sender<()>,
    watchdog: JoinHandle<bool>,
}

/// How a run ended.
#[derive(Debug)]
struct End {
    lines: Vec<String>,
    errors: String,
    status: ExitStatus,
}

impl Run {
    /// Runs a shell script that turns into the demo by `exec "$0"`.
    fn start(script: &str) -> Run {
        #[cfg(target_os = "linux")] // a child that nobody waited for then shows in `end`
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let _start = START.lock();
        let mut parent = Command::new("/bin/sh")
            .args([
                "-c",
                &format!("echo; {script}"),
                env!("CARGO_BIN_EXE_propool"),
            ])
            .env("OUT", OUT)
            .env("RUST_BACKTRACE", "0")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(parent.stdout.take().unwrap());
        output.read_line(&mut String::new()).unwrap(); // the shell's `echo`
        let group = Pid::from_raw(parent.id().try_into().unwrap());
        let (over, watched) = mpsc::channel();
        let watchdog = thread::spawn(move || {
            let over = watched.recv_timeout(DEADLINE);
            if over.is_err() {
                let _ = killpg(group, Signal::SIGKILL); // it hangs, or the test has failed
            }
            over == Err(RecvTimeoutError::Timeout)
        });
        Run {
            parent,
            output: Some(output),
            over,
            watchdog,
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.parent.id().try_into().unwrap())
    }

    /// The next line of its output; none at the end.
    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        self.output.as_mut()?.read_line(&mut line).unwrap();
        let text = line.trim_start_matches(' '); // what `held` fills the output with are spaces
        assert!(
            text.is_empty() || text.ends_with('\n'),
            "half a line: {text}"
        );
        (!text.is_empty()).then(|| text.trim_end().to_string())
    }

    /// Closes its output, so that it cannot print any more.
    #[cfg(target_os = "linux")]
    fn close(&mut self) {
        let _start = START.lock();
        self.output = None;
    }

    /// Waits until all its processes have ended, and the parent has reaped its children.
    fn end(mut self) -> End {
        let lines = iter::from_fn(|| self.line()).collect();
        let mut errors = String::new();
        self.parent
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut errors)
            .unwrap();
        let status = self.parent.wait().unwrap();
        let orphaned = status.signal().is_none() && killpg(self.pid(), None).is_ok();
        let _ = self.over.send(());
        assert!(
            !self.watchdog.join().unwrap(),
            "it hangs: {lines:?} {errors}"
        );
        assert!(
            !orphaned,
            "a child that the parent did not wait for: {lines:?} {errors}"
        );
        End {
            lines,
            errors,
            status,
        }
    }

    /// Kills the parent, and waits until it is dead.
    #[cfg(target_os = "linux")]
    fn kill_parent(&self) {
        kill(self.pid(), Signal::SIGKILL).unwrap();
        while state(self.pid()) != 'Z' {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes the pipe of its output as small as it can be, and returns its size.
    #[cfg(target_os = "linux")]
    fn shrink(&self) -> u64 {
        let output = self.output.as_ref().unwrap().get_ref().as_raw_fd();
        // SAFETY: the call gets numbers only; no memory of this process is touched.
        let size = unsafe { libc::fcntl(output, libc::F_SETPIPE_SZ, 1) };
        size.try_into().unwrap()
    }

    /// Runs the demo with an output that has room for `room` bytes and is not read before the next
    /// `line`: whoever prints more waits. Returns the children that the parent has made by then.
    #[cfg(target_os = "linux")]
    fn held(room: u64) -> (Run, Vec<Pid>) {
        let mut run = Run::start("read -r filler; printf \"%${filler}s\"; exec \"$0\"");
        let filler = run.shrink() - room;
        writeln!(run.parent.stdin.take().unwrap(), "{filler}").unwrap();
        let children = format!("/proc/{0}/task/{0}/children", run.pid());
        let children = || fs::read_to_string(&children).unwrap();
        while children().is_empty() || state(run.pid()) != 'S' {
            assert_ne!(state(run.pid()), 'Z', "it ended early");
            thread::sleep(Duration::from_millis(1));
        }
        let children = children();
        let children = children
            .split_whitespace()
            .map(|pid| Pid::from_raw(pid.parse().unwrap()));
        let children = children.collect();
        (run, children)
    }
}

/// What a process does, by Linux's letter for it: T if it is stopped, Z if it has ended.
#[cfg(target_os = "linux")]
fn state(pid: Pid) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or(") Z".to_string());
    stat.rsplit(") ").next().unwrap().chars().next().unwrap()
}

/// Stops a process, unless it has ended, and waits until it has stopped.
#[cfg(target_os = "linux")]
fn stop(pid: Pid) {
    let _ = kill(pid, Signal::SIGSTOP);
    while !['T', 'Z'].contains(&state(pid)) {
        thread::sleep(Duration::from_millis(1));
    }
}
