//! A parent runs a function in a child process, and waits for it to end.
//!
//! The tutorial's section 二、multiprocessing, `demo2/multipro.py`.
//! Run it with `cargo run -p multipro`.

use std::fmt;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::panic::{self, AssertUnwindSafe};

use nix::errno::Errno;
use nix::libc::_exit;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid};

// The code that the child process runs
fn run_proc(name: &str) {
    println!("Run child process {name} ({})...", getpid());
}

fn main() -> Result<(), Error> {
    println!("Parent process {}.", getpid());
    let p = Process::new(run_proc, "test");
    println!("Child process will start.");
    let p = p.start()?;
    p.join()?;
    println!("Child process end.");
    Ok(())
}

// What Python brings along:

/// Stands in for `multiprocessing.Process(target=…, args=(…,))`, before its start.
///
/// [`start`](Process::start) turns it into a [`Child`]: no way to start it twice, or to join it
/// before.
struct Process<A> {
    target: fn(A),
    args: A,
}

impl<A> Process<A> {
    /// Takes note of a function and its argument; there is no child before `start`.
    fn new(target: fn(A), args: A) -> Self {
        Process { target, args }
    }

    /// Stands in for `Process.start()`: forks a child that runs the target and ends with it.
    ///
    /// The child has its own copy of the parent's memory, and shares its open files. If it draws
    /// random numbers from `rand`, it must call `rand::rng().reseed()` first. The caller must see
    /// to it, as the compiler does not, that this process has a single thread: a lock that another
    /// one holds would never be released in the child. Fails if standard output cannot be flushed
    /// or fork(2) fails; then there is no child.
    fn start(self) -> Result<Child, Error> {
        io::stdout().flush().map_err(failed("flush"))?; // the child would print what is left, too
        // SAFETY: the caller sees to it that this process has a single thread, so its child may do
        // whatever it may do itself.
        match unsafe { fork() }.map_err(failed("fork"))? {
            ForkResult::Child => bootstrap(|| {
                (self.target)(self.args);
                Ok(())
            }),
            ForkResult::Parent { child } => Ok(Child { pid: child }),
        }
    }
}

/// Stands in for a `multiprocessing.Process` after its start.
///
/// One that is dropped is waited for, as Python does when it exits; a bad end shows on stderr.
#[must_use = "only `join` returns how it ended"]
struct Child {
    pid: Pid,
}

impl Child {
    /// Stands in for `Process.join()`: waits until the child has ended, and reaps it.
    ///
    /// Fails if the child panicked, died of a signal or exited with a status other than 0.
    fn join(self) -> Result<(), Error> {
        wait(ManuallyDrop::new(self).pid) // reaped here, then not in `drop`
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Err(error) = wait(self.pid) {
            let _ = writeln!(io::stderr(), "Error: {error:?}"); // there is nobody else to tell
        }
    }
}

/// Stands in for `Process._bootstrap()`: runs `run` in a child, and ends the child with status 0 if
/// it returns `Ok`, or else, after showing why, with status 1.
///
/// The child never gets to the code, the destructors and the exit handlers of its parent.
fn bootstrap(run: impl FnOnce() -> Result<(), Error>) -> ! {
    let ended = panic::catch_unwind(AssertUnwindSafe(run));
    let flushed = io::stdout().flush().map_err(failed("flush"));
    let ended = ended.map(|result| result.and(flushed));
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
        return Err(Error(format!("process {pid} {end}")));
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
