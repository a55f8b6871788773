//! Four worker processes share out five tasks: whoever is free takes the next.
//!
//! The tutorial's section 三、进程池 (the process pool), `demo2/propool.py`.
//! Run it with `cargo run -p propool`.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::panic::{self, AssertUnwindSafe};
use std::time::{Duration, Instant};
use std::{fmt, mem, ptr, thread};

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
        p.apply_async(long_time_task, i)?;
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
/// All of them read from one pipe, and whoever is free takes the next task out of it. A task goes
/// through whole, as it is far shorter than `PIPE_BUF`: two words, the address of a function, which
/// is the same in a fork of this program, and an argument.
struct Pool {
    tasks: File, // the write end
    workers: Workers,
}

/// What goes through the pipe; with the address 0 it is no task, but tells one worker to stop.
type Task = [[u8; size_of::<usize>()]; 2];

impl Pool {
    /// Stands in for `Pool(processes)`: forks so many workers, at least one, before any task.
    ///
    /// The caller must see to it that this process has a single thread: a lock that another one
    /// holds would never be released in a worker. Fails if standard output cannot be flushed or on
    /// pipe(2), fcntl(2) or fork(2); then no worker is left.
    fn new(processes: usize) -> Result<Self, Error> {
        let (task_reader, tasks) = pipe()?;
        let (reports, report_writer) = pipe()?;
        let mut workers = Workers {
            pids: Vec::new(),
            reports,
            handed_out: 0,
        };
        io::stdout().flush().map_err(failed("flush"))?; // or workers print the buffer's rest too
        let parent = getpid();
        for _ in 0..processes {
            // SAFETY: the caller sees to it that this process has a single thread, so its child may
            // do whatever it may do itself.
            match unsafe { fork() }.map_err(failed("fork"))? {
                ForkResult::Child => {
                    drop(tasks); // unused here; left open, it would hold off the end-of-file
                    bootstrap(|| work(parent, task_reader, report_writer))
                }
                ForkResult::Parent { child } => workers.pids.push(child),
            }
        }
        // `task_reader` and `report_writer` close here, unused in the parent; left open, they would
        // hide that no worker is left to take a task, or to report.
        Ok(Pool { tasks, workers })
    }

    /// Stands in for `Pool.apply_async(func, args=(arg,))`: hands a task to whoever is free first.
    ///
    /// Does not wait for the task, only for room in the pipe, which holds some thousand tasks.
    /// Fails if no worker is left, and says how they ended.
    fn apply_async(&mut self, func: fn(usize), arg: usize) -> Result<(), Error> {
        let address = (func as *const ()).expose_provenance();
        let task: Task = [address, arg].map(usize::to_ne_bytes);
        match self.tasks.write_all(task.as_flattened()) {
            Err(cause) if cause.kind() == ErrorKind::BrokenPipe => self.workers.reap()?,
            result => result.map_err(failed("hand out a task"))?,
        }
        self.workers.handed_out += 1;
        Ok(())
    }

    /// Stands in for `Pool.close()`: no more tasks; each worker ends when it finds none left.
    fn close(mut self) -> Workers {
        // End-of-file would tell them, too, if nothing that was forked meanwhile, such as a second
        // pool, had this write end. If no worker is left to be told, `join` says so.
        for _ in &self.workers.pids {
            let _ = self.tasks.write_all(Task::default().as_flattened());
        }
        self.workers
    }
}

/// What a worker does: runs tasks until it is to stop, and then reports how many have returned.
///
/// Fails if the random number generator cannot be seeded anew.
fn work(parent: Pid, mut tasks: File, mut reports: File) -> Result<(), Error> {
    rand::rng().reseed().map_err(failed("reseed"))?; // or all workers draw the same numbers
    let mut returned: usize = 0;
    let mut task = Task::default();
    // When the parent has died, there is an end-of-file, but there may be tasks before it.
    while tasks.read_exact(task.as_flattened_mut()).is_ok() && getppid() == parent {
        let [address, arg] = task.map(usize::from_ne_bytes);
        if address == 0 {
            break;
        }
        let address = ptr::with_exposed_provenance::<()>(address);
        // SAFETY: `apply_async` got this address from a `fn(usize)` of this very program.
        let func = unsafe { mem::transmute::<*const (), fn(usize)>(address) };
        let ended = panic::catch_unwind(|| func(arg)); // a panic ends the task, not the worker
        let flushed = io::stdout().flush();
        returned += usize::from(ended.is_ok() && flushed.is_ok());
    }
    let _ = reports.write_all(&returned.to_ne_bytes()); // tasks not reported count as failed
    Ok(())
}

/// Stands in for a `multiprocessing.Pool` after its `close`.
///
/// If it, or a `Pool`, is dropped, the workers are killed and reaped, as Python does.
#[must_use = "only `join` returns whether all tasks were done"]
struct Workers {
    pids: Vec<Pid>, // not reaped yet
    reports: File,  // the read end
    handed_out: usize,
}

impl Workers {
    /// Stands in for `Pool.join()`: waits until all workers have ended, and reaps them.
    ///
    /// Fails, and says how they ended, if workers died, or else says how many tasks failed.
    fn join(mut self) -> Result<(), Error> {
        self.reap()?;
        let mut failures = self.handed_out;
        let mut returned = usize::MIN.to_ne_bytes();
        while self.reports.read_exact(&mut returned).is_ok() {
            failures -= usize::from_ne_bytes(returned);
        }
        match failures {
            0 => Ok(()),
            _ => Err(Error(format!(
                "{failures} of {} tasks failed",
                self.handed_out
            ))),
        }
    }

    fn reap(&mut self) -> Result<(), Error> {
        let failures = self.pids.drain(..).filter_map(|pid| wait(pid).err());
        let failures: Vec<_> = failures.map(|Error(failure)| failure).collect();
        if failures.is_empty() {
            Ok(())
        } else {
            Err(Error(failures.join(", ")))
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for &pid in &self.pids {
            let _ = kill(pid, Signal::SIGKILL); // not reaped yet, so that the pid is still its own
        }
        let _ = self.reap(); // how they ended is known
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

/// Stands in for `Process._bootstrap()`: runs `run` in a child and ends the child with it, by
/// status 0 if it returns `Ok`, and by status 1 if it fails or panics, which is then shown.
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
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
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
