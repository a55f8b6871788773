//! Four worker processes share out five tasks: whoever is free takes the next.
//!
//! The tutorial's section 三、进程池 (the process pool), `demo2/propool.py`.
//! Run it with `cargo run -p propool`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::panic::{self, AssertUnwindSafe};
use std::time::{Duration, Instant};
use std::{fmt, mem, thread};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc::_exit;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{self, ForkResult, Pid, fork, getpid, getppid};

fn long_time_task(name: usize) {
    println!("Run task {name} ({})...", getpid());
    let start = Instant::now();
    thread::sleep(Duration::from_secs_f64(rand::random::<f64>() * 3.0));
    let end = Instant::now();
    println!(
        "Task {name} runs {:.2} seconds.",
        (end - start).as_secs_f64()
    );
}

fn main() -> Result<(), Error> {
    println!("Parent process {}.", getpid());
    let mut p = Pool::new(4)?;
    for i in 0..5 {
        p.apply_async(long_time_task, i);
    }
    println!("Waiting for all subprocesses done...");
    let p = p.close();
    p.join()?;
    println!("All subprocesses done.");
    Ok(())
}

// What Python brings along:

/// Stands in for `multiprocessing.Pool`: worker processes that share out the tasks they are given.
///
/// All of them read from one pipe, and whoever is free takes the next task out of it. A task is two
/// words: the address of a function, which is the same in a fork of this program, and an argument.
/// It is written whole, as it is far shorter than `PIPE_BUF`, and read whole, as all tasks have one
/// length and the kernel lets one process at a time read.
struct Pool {
    tasks: File, // the write end
    closed: ClosedPool,
}

/// What goes through the pipe; with the address 0 it is no task, but tells one worker to stop.
type Task = [[u8; size_of::<usize>()]; 2];

impl Pool {
    /// Stands in for `Pool(processes)`: forks that many workers, before any task. It must not be 0.
    ///
    /// The caller must see to it, as the compiler does not, that this process has a single thread:
    /// a lock that another one holds would never be released in a worker. Fails if standard output
    /// cannot be flushed, or pipe(2), fcntl(2) or fork(2) fails; then no worker is left.
    fn new(processes: usize) -> Result<Self, Error> {
        let (task_reader, tasks) = pipe()?;
        let (reports, report_writer) = pipe()?;
        let mut workers = Vec::new();
        io::stdout().flush().map_err(failed("flush"))?; // workers would print what is left, too
        let parent = getpid();
        for _ in 0..processes {
            // SAFETY: the caller sees to it that this process has a single thread, so its child may
            // do whatever it may do itself.
            match unsafe { fork() }.map_err(failed("fork"))? {
                ForkResult::Child => {
                    drop((tasks, reports)); // unused here; `tasks` would hold off the end-of-file
                    bootstrap(|| work(parent, task_reader, report_writer))
                }
                ForkResult::Parent { child } => workers.push(Child { pid: child }),
            }
        }
        // `task_reader` and `report_writer` close here, unused in the parent; left open, they would
        // hide that no worker is left to take a task, or to report.
        let closed = ClosedPool {
            workers,
            reports,
            handed_out: 0,
        };
        Ok(Pool { tasks, closed })
    }

    /// Stands in for `Pool.apply_async(func, args=(arg,))`: hands a task to whoever is free first.
    ///
    /// Does not wait for the task, only for room in the pipe, which mostly holds 4,096 tasks. A
    /// task that no worker is left to take counts as failed in `join`.
    fn apply_async(&mut self, func: fn(usize), arg: usize) {
        let task: Task = [func as usize, arg].map(usize::to_ne_bytes);
        let _ = self.tasks.write_all(task.as_flattened()); // `join` says why no worker is left
        self.closed.handed_out += 1;
    }

    /// Stands in for `Pool.close()`: no more tasks; each worker ends when it finds none left.
    fn close(mut self) -> ClosedPool {
        // End-of-file would tell them, too, if nothing that was forked meanwhile, such as a second
        // pool, had this write end.
        for _ in &self.closed.workers {
            let _ = self.tasks.write_all(Task::default().as_flattened()); // if one is left to tell
        }
        self.closed
    }
}

/// What a worker does: runs tasks until it is to stop, and then reports how many have returned.
///
/// Fails if the random number generator cannot be seeded anew.
fn work(parent: Pid, mut tasks: File, mut reports: File) -> Result<(), Error> {
    rand::rng().reseed().map_err(failed("reseed"))?; // or all may draw the same numbers
    let mut returned: usize = 0;
    let mut task = Task::default();
    // When the parent has died, there is an end-of-file, but there may be tasks before it.
    while tasks.read_exact(task.as_flattened_mut()).is_ok() && getppid() == parent {
        let [address, arg] = task.map(usize::from_ne_bytes);
        if address == 0 {
            break;
        }
        // SAFETY: `apply_async` wrote this address, of a `fn(usize)` of this very program.
        let func = unsafe { mem::transmute::<*const (), fn(usize)>(address as *const ()) };
        let ended = panic::catch_unwind(|| func(arg)); // a panic ends the task, not the worker
        returned += usize::from(ended.is_ok());
    }
    // What is not reported, as when the tasks' output cannot be written, counts as failed.
    match io::stdout().flush() {
        Ok(()) => drop(reports.write_all(&returned.to_ne_bytes())),
        Err(cause) => drop(writeln!(io::stderr(), "Error: flush: {cause}")),
    }
    Ok(())
}

/// Stands in for a `multiprocessing.Pool` after its `close`.
#[must_use = "only `join` returns whether all tasks were done"]
struct ClosedPool {
    workers: Vec<Child>,
    reports: File, // the read end
    handed_out: usize,
}

impl ClosedPool {
    /// Stands in for `Pool.join()`: waits until all workers have ended, and reaps them.
    ///
    /// Fails if workers died, and says how, or else if tasks failed, and says how many.
    fn join(mut self) -> Result<(), Error> {
        let mut failures = self.handed_out;
        let mut returned = [0; size_of::<usize>()];
        while self.reports.read_exact(&mut returned).is_ok() {
            failures -= usize::from_ne_bytes(returned);
        }
        let mut ends = Vec::new();
        for worker in self.workers {
            ends.extend(worker.join().err().map(|Error(end)| end));
        }
        if ends.is_empty() && failures > 0 {
            ends.push(format!("{failures} of {} tasks failed", self.handed_out));
        }
        if ends.is_empty() {
            Ok(())
        } else {
            Err(Error(ends.join(", ")))
        }
    }
}

/// A worker. One that is dropped, with its pool, is killed and reaped, as Python does.
struct Child {
    pid: Pid,
}

impl Child {
    /// Waits until the worker has ended, and reaps it. Fails if it died.
    fn join(self) -> Result<(), Error> {
        wait(ManuallyDrop::new(self).pid) // reaped here, then not in `drop`
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL); // not reaped yet, so the pid is still its own
        let _ = wait(self.pid); // it was killed just now
    }
}

/// Stands in for `os.pipe()`: a read end and a write end, not inherited by programs that are run.
///
/// Fails if there are no file descriptors left.
fn pipe() -> Result<(File, File), Error> {
    let (reader, writer) = unistd::pipe().map_err(failed("pipe"))?;
    for end in [&reader, &writer] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(failed("fcntl"))?;
    }
    Ok((reader.into(), writer.into()))
}

/// Stands in for `Process._bootstrap()`: runs `run` in a child, and ends the child with status 0 if
/// it returns `Ok`, or else, after showing why, with status 1.
///
/// The child never gets to the code, the destructors and the exit handlers of its parent.
fn bootstrap(run: impl FnOnce() -> Result<(), Error>) -> ! {
    let ended = panic::catch_unwind(AssertUnwindSafe(run));
    if let Ok(Err(error)) = &ended {
        let _ = writeln!(io::stderr(), "Error: {error:?}"); // if it cannot be shown, status 1 tells
    }
    // SAFETY: `_exit` has no precondition; it ends this process on the spot.
    unsafe { _exit(i32::from(!matches!(ended, Ok(Ok(()))))) }
}

/// Stands in for `os.waitpid(pid, 0)`: waits until the child `pid` has ended, and reaps it.
///
/// Fails, and says how it ended, unless it exited with status 0.
fn wait(pid: Pid) -> Result<(), Error> {
    loop {
        let end = match waitpid(pid, None) {
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(WaitStatus::Exited(_, status)) => format!("exited with status {status}"),
            Ok(WaitStatus::Signaled(_, by, _)) => format!("was killed by {by}"),
            Ok(_) | Err(Errno::EINTR) => continue, // it has not ended yet
            Err(cause) => format!("cannot be waited for: {cause}"),
        };
        return Err(Error(format!("worker {pid} {end}")));
    }
}

/// Stands in for an exception that ends the program: what went wrong, in one line.
struct Error(String);

/// `main` shows the error that it returns by `Debug`, so that is the line as it stands.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes an [`Error`] of a cause by saying what failed.
fn failed<E: fmt::Display>(what: &str) -> impl FnOnce(E) -> Error {
    move |cause| Error(format!("{what}: {cause}"))
}
